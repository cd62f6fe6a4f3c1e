"""`sdfp plan MODEL`, as a user starts it; what it planned is served."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy
from tests.support.engines import assert_identical, engine, spec_counters, tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_plan_is_made_and_drafts(tmp_path):
    sdfp = Path(sys.executable).parent / "sdfp"
    size = ["--sequences", "2", "--length", "64", "--dtype", "float32"]
    done = subprocess.run(
        [sdfp, "plan", str(toy.MODEL), "-o", str(tmp_path), *size, "--layers", "8", "--anyway"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    prompts = ["import os\n\n\ndef main(", "class Node:\n    def __init__(self", "for i in range("]
    with engine(toy.MODEL) as plain:
        wanted = tokens(plain, prompts)
    with engine(toy.MODEL, {"method": "sdfp", "model": str(tmp_path), "num_speculative_tokens": 2}) as llm:
        assert_identical(tokens(llm, prompts), wanted)
        assert spec_counters(llm)["num_draft_tokens"] > 0

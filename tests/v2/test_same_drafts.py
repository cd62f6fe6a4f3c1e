"""One plan, two runners, the same drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import engine, runner, tokens

pytestmark = pytest.mark.engine


def greedy_drafts(target: Path, plan: str, prompts: list[list[int]]) -> list[list[int]]:
    """What the engine of the runner now configured proposes, round by round, one request at a time."""
    drafts: list[list[int]] = []
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        made = runner(llm)
        proposer = getattr(made, "drafter", None) or made.speculator
        propose = proposer.propose

        def spy(*args: Any, **kwargs: Any) -> Any:
            out = propose(*args, **kwargs)
            drafts.append(out[0].tolist())
            return out

        proposer.propose = spy
        tokens(llm, prompts, batch=1, max_tokens=16)
    return drafts


def test_v1_and_v2_draft_the_same_tokens(
    target: Path, plan: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    some = [p[:50] for p in prompts[:4]]
    v2 = greedy_drafts(target, plan, some)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    v1 = greedy_drafts(target, plan, some)
    assert len(v1) > 8 and all(len(round_) == 3 for round_ in v1)
    assert v2 == v1

"""Rounded drafts in the V2 runner: what V1 drafts with the same view, and plain vLLM's answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfp_vllm.plan.schema import DraftHead, StoredView
from sdfp_vllm.plan.view import DraftView
from tests.engine_v2.test_same_drafts import greedy_drafts
from tests.support.engines import assert_identical, engine, spec_counters, tokens, write_plan

pytestmark = pytest.mark.engine
VIEW = DraftView.from_units(
    {("attention", 0): "int8", ("mlp", 5): "int8", ("attention", 15): "full", ("mlp", 15): "int8"}
)


def test_v1_and_v2_draft_the_same_tokens_and_answers_are_plain_vllms(
    target: Path, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    view = StoredView.of(VIEW, 16, head=DraftHead(precision="int8"))
    plan = write_plan(target, tmp_path, VIEW, 3, view=view)
    some = [p[:30] for p in prompts[:2]]
    with engine(target) as llm:
        want = tokens(llm, some, max_tokens=8)
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        assert_identical(tokens(llm, some, max_tokens=8), want)
        assert spec_counters(llm)["num_draft_tokens"] > 0
    v2 = greedy_drafts(target, plan, some)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert len(v2) > 4 and v2 == greedy_drafts(target, plan, some)

"""Draft lengths that the scheduler chooses by what was accepted, on the V2 runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdfp_vllm.pacing.batch import BatchPolicy
from tests.support.engines import assert_identical, engine, pacing_by_hand, spec_counters, tokens, write_plan

pytestmark = pytest.mark.engine


def test_lengths_follow_what_is_accepted(
    target: Path, kept: list[int], tmp_path: Path, prompts: list[list[int]]
):
    """Costs under which drafting pays at the plan's acceptance and not at half of it; then true acceptance decides."""
    some = [p[:40] for p in prompts[:4]]
    pacing = pacing_by_hand(row_ms=0.01, acceptance=[0.9] * 3)
    plan = write_plan(target, tmp_path, kept, k=3, pacing=pacing)
    with engine(target) as llm:
        expected = tokens(llm, some, max_tokens=24)
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        policy = scheduler.dynamic_sd_lookup
        assert isinstance(policy, BatchPolicy) and policy[4] == 3
        assert_identical(tokens(llm, some, max_tokens=24), expected)
        counters = spec_counters(llm)
        assert counters["num_accepted_tokens"] > 0
        for _ in range(400):  # a stretch of traffic that accepts nothing
            policy.observe(3, 0)
        assert_identical(tokens(llm, some, max_tokens=12), expected_start(expected, 12))
        after = spec_counters(llm)
    assert after["num_draft_tokens"] - counters["num_draft_tokens"] <= 2 * 3 * 4  # two tries at most


def expected_start(answers: list[list[list[int]]], count: int) -> list[list[list[int]]]:
    return [[ids[:count] for ids in answer] for answer in answers]

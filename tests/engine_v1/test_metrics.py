"""Our counters on /metrics: they move with real requests, and agree with vLLM's own and with the pacer."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from sdfp_vllm.engine.metrics import COUNTERS
from tests.support.engines import engine, pacing_by_hand, runner, spec_counters, tokens, write_plan

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def llm(target, kept, tmp_path_factory):
    plan = write_plan(target, tmp_path_factory.mktemp("paced"), kept, k=3, pacing=pacing_by_hand())
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        runner(llm).drafter.pacer.timed = False
        yield llm


def counted(llm) -> dict[str, float]:
    name = llm.llm_engine.vllm_config.model_config.served_model_name
    labels = {"model_name": name, "engine": "0"}
    found = {c: REGISTRY.get_sample_value(f"sdfp:{c}_total", labels) for c in COUNTERS}
    assert None not in found.values(), found
    return found


def test_counters_agree_with_vllms_and_with_the_pacer(llm, prompts):
    before, tally = counted(llm), runner(llm).drafter.pacer.tally
    drafted, vllms = (tally.model_drafts, tally.copied_drafts), spec_counters(llm)["num_draft_tokens"]
    tokens(llm, prompts[:8], batch=4)
    got = {name: value - before[name] for name, value in counted(llm).items()}
    verified = spec_counters(llm)["num_draft_tokens"] - vllms
    ours = got["model_draft_tokens"] + got["copied_draft_tokens"]
    assert got["model_draft_tokens"] and got["copied_draft_tokens"]
    # Drafts of a request that ends are never verified; the last round's counts come with the next step.
    assert verified <= ours
    assert got["model_draft_tokens"] <= tally.model_drafts - drafted[0]
    assert got["copied_draft_tokens"] <= tally.copied_drafts - drafted[1]
    assert 0 <= got["paused_rounds"] < got["rounds"] <= ours + got["paused_rounds"]
    assert got["draft_milliseconds"] > 0


def test_rounds_without_drafts_are_counted_as_paused(llm, prompts, monkeypatch):
    from sdfp_vllm.pacing import policy

    monkeypatch.setattr(policy, "CAUTION", 1e9)  # nothing pays
    before = counted(llm)
    tokens(llm, prompts[:2], batch=1)
    got = {name: value - before[name] for name, value in counted(llm).items()}
    assert got["paused_rounds"] > got["rounds"] / 2 > 0


def test_rounds_that_are_not_paced_are_not_counted(llm, prompts):
    tokens(llm, prompts[:1], seed=3, temperature=1.0)  # brings what the last round left
    before = counted(llm)
    tokens(llm, prompts[:1], seed=3, temperature=1.0)
    assert counted(llm) == before

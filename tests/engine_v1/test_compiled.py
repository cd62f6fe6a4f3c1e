"""torch.compile: the draft is a graph of its own over the target's weights, and changes no token."""

from __future__ import annotations

import pytest

from sdfp_vllm.plan.schema import DraftHead, StoredView
from sdfp_vllm.plan.view import DraftView
from tests.support.engines import assert_identical, engine, runner, spec_counters, tokens, write_plan

pytestmark = [pytest.mark.engine, pytest.mark.more]


def test_compiled_draft_gives_plain_tokens(target, plan, prompts, plain_tokens):
    with engine(target, {"method": "sdfp", "model": plan}, enforce_eager=False) as llm:
        assert_identical(tokens(llm, prompts[:24]), plain_tokens[:24])
        assert spec_counters(llm)["num_accepted_tokens"] > 0
        assert not runner(llm).drafter.model.do_not_compile


def test_compiled_drafts_on_rounded_weights_give_plain_tokens(target, prompts, plain_tokens, tmp_path):
    view = DraftView.at((0, 5, 10, 15), "int8")
    stored = StoredView.of(view, 16, head=DraftHead(precision="int8"))
    plan = write_plan(target, tmp_path, view, k=3, view=stored)
    with engine(target, {"method": "sdfp", "model": plan}, enforce_eager=False) as llm:
        assert_identical(tokens(llm, prompts[:24]), plain_tokens[:24])
        assert spec_counters(llm)["num_accepted_tokens"] > 0
        assert not runner(llm).drafter.model.do_not_compile


def test_another_keep_set_is_another_graph(target, kept, plan, tmp_path):
    """vLLM keys compiled graphs by config hash: two keep sets must never share one."""
    from vllm import EngineArgs

    def config_hash(folder):
        settings = {"method": "sdfp", "model": folder}
        config = EngineArgs(str(target), dtype="float32", speculative_config=settings).create_engine_config()
        return config.speculative_config.compute_hash()

    other = write_plan(target, tmp_path, [kept[0], kept[-1]], k=3)
    assert config_hash(plan) == config_hash(plan) != config_hash(other)

"""Two tensor-parallel workers give, with SDFP, what two give without; and every rank drafts the same."""

from __future__ import annotations

import os

import pytest

from sdfp_vllm.plan.schema import DraftHead, StoredView
from sdfp_vllm.plan.view import DraftView
from tests.support.adapters import adapted_tokens, adapter, plain_answers, write_adapter
from tests.support.engines import assert_identical, engine, spec_counters, tokens, write_plan
from tests.support.restricted_plans import write_restricted_plan

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores"),
]

SETTINGS = dict(tensor_parallel_size=2, distributed_executor_backend="mp")


@pytest.fixture(autouse=True)
def a_core_for_each(monkeypatch):
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")


def test_same_tokens(target, plan, prompts):
    with engine(target, **SETTINGS) as llm:
        want = tokens(llm, prompts[:32])
    with engine(target, {"method": "sdfp", "model": plan}, **SETTINGS) as llm:
        assert_identical(tokens(llm, prompts[:32]), want)
        counters = spec_counters(llm)
    assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]


def test_same_tokens_with_a_restricted_head(target, kept, prompts, tmp_path):
    """The tokens lie on both ranks' stretches; drafts are as good as one rank's with that head."""
    some = prompts[:16]
    with engine(target) as llm:
        want = tokens(llm, some)
    part = [t for i, t in enumerate(sorted({t for answer in want for t in answer[0]})) if i % 3]
    plan = write_restricted_plan(target, tmp_path, kept, 3, part)
    accepted = []
    for settings in ({}, SETTINGS):
        with engine(target, {"method": "sdfp", "model": plan}, **settings) as llm:
            got = tokens(llm, some)
            counters = spec_counters(llm)
            accepted.append(counters["num_accepted_tokens"] / counters["num_draft_tokens"])
        if not settings:
            assert_identical(got, want)
    assert (
        sum(g == w for g, w in zip(got, want, strict=True)) >= 15
    )  # two ranks may round a tie the other way
    assert accepted[1] == pytest.approx(accepted[0], rel=0.05)


def test_same_tokens_with_adapters_and_a_restricted_head(target, prompts, tmp_path):
    """The head's adapter is sliced by neither rank: each adds it to the logits that both gathered."""
    some, lora = prompts[:9], dict(enable_lora=True, max_loras=2, max_lora_rank=8)
    first = write_adapter(target, tmp_path / "first", seed=1)
    second = write_adapter(target, tmp_path / "second", seed=2, head=0.5, embedding=0.3)
    mixed = [None, adapter("first", 1, first), adapter("second", 2, second)]
    with engine(target, **lora, **SETTINGS) as llm:
        want = plain_answers(llm, some, mixed)
    known = sorted({t for answer in want for t in answer})
    plan = write_restricted_plan(target, tmp_path / "plan", range(16), 3, known)
    with engine(target, {"method": "sdfp", "model": plan}, **lora, **SETTINGS) as llm:
        assert_identical(adapted_tokens(llm, some, mixed), want)
        counters = spec_counters(llm)
    assert counters["num_accepted_tokens"] > 0.97 * counters["num_draft_tokens"] > 50


def test_same_tokens_on_rounded_shards(target, prompts, tmp_path):
    """Each rank rounds its own shard; drafts are as good as one rank's."""
    view = DraftView.at(range(16), "int8")
    plan = write_plan(
        target, tmp_path, view, 3, view=StoredView.of(view, 16, head=DraftHead(precision="int8"))
    )
    some = prompts[:16]
    with engine(target, **SETTINGS) as llm:
        want = tokens(llm, some)
    accepted = []
    for settings in ({}, SETTINGS):
        with engine(target, {"method": "sdfp", "model": plan}, **settings) as llm:
            got = tokens(llm, some)
            counters = spec_counters(llm)
            accepted.append(counters["num_accepted_tokens"] / counters["num_draft_tokens"])
    assert_identical(got, want)
    assert accepted[1] == pytest.approx(accepted[0], abs=0.05)


def test_ranks_draw_the_same_drafts_under_a_cut(target, plan, prompts):
    """Each rank draws for itself: were tokens or distributions to differ, few drafts would be accepted."""
    accepted = []
    for settings in ({}, SETTINGS):
        with engine(target, {"method": "sdfp", "model": plan}, **settings) as llm:
            tokens(llm, prompts[:32], temperature=1.0, top_k=20, top_p=0.9)
            counters = spec_counters(llm)
            accepted.append(counters["num_accepted_tokens"] / counters["num_draft_tokens"])
    print(f"acceptance on one rank and on two: {accepted}")
    assert accepted[1] == pytest.approx(accepted[0], rel=0.1)


def test_ranks_read_the_same_window(target, plan, prompts, plain_tokens):
    """Each rank edits its own block table: were they to differ, few drafts would be accepted."""
    long = [i for i, p in enumerate(prompts) if len(p) > 100][:16]
    some, want = [prompts[i] for i in long], [plain_tokens[i] for i in long]
    accepted = []
    for settings in ({}, SETTINGS):
        with engine(
            target, {"method": "sdfp", "model": plan, "window": 20}, block_size=32, **settings
        ) as llm:
            got = tokens(llm, some)
            counters = spec_counters(llm)
            accepted.append(counters["num_accepted_tokens"] / counters["num_draft_tokens"])
    assert (
        sum(g == w for g, w in zip(got, want, strict=True)) >= 15
    )  # two ranks may round a tie the other way
    assert accepted[1] == pytest.approx(accepted[0], rel=0.05)

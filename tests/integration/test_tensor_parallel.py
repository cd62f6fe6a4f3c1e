"""Two tensor-parallel workers give, with SDFP, what two give without; and every rank drafts the same."""

from __future__ import annotations

import os

import pytest
from engines import assert_identical, engine, spec_counters, tokens

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

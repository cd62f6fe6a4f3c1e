"""Sampled drafts follow the top-k and top-p of their request: more are accepted, and pacing still works.

`test_sampling.py` has their exactness. Here nothing goes by a clock, and engines have a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sdfp_vllm.engine.v1 import draft_step, proposer
from sdfp_vllm.engine.v1.draft_step import DraftStep
from tests.support.engines import engine, pacing_by_hand, runner, spec_counters, write_plan

pytestmark = pytest.mark.engine

LENGTH = 32


@pytest.fixture(scope="module")
def llm(target, plan) -> Iterator[Any]:
    """Three drafts a round, always."""
    settings = {"method": "sdfp", "model": plan}
    with engine(target, settings, max_num_seqs=32) as llm:
        yield llm


def generate(llm: Any, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, detokenize=False, **params)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in out]


def acceptance(llm: Any, prompts: list[list[int]], **params: Any) -> float:
    before = spec_counters(llm)
    generate(llm, prompts, **params)
    after = spec_counters(llm)
    accepted, drafted = (after[n] - before[n] for n in ("num_accepted_tokens", "num_draft_tokens"))
    return accepted / drafted


@pytest.mark.parametrize("cuts", [dict(top_k=20, top_p=0.9), dict(top_k=10), dict(top_p=0.5)], ids=str)
def test_drafts_that_follow_the_cut_are_accepted_more_often(llm, prompts, monkeypatch, cuts):
    follows = acceptance(llm, prompts[:32], temperature=1.0, **cuts)
    monkeypatch.setattr(draft_step, "cut", lambda probs, top_k, top_p: probs)
    ignores = acceptance(llm, prompts[:32], temperature=1.0, **cuts)
    print(f"{cuts}: {follows:.3f} accepted, {ignores:.3f} where drafts ignore it")
    assert follows > ignores + 0.05


def test_every_draft_lies_in_the_cut(llm, prompts, monkeypatch):
    """And the batch without one takes vLLM's own way."""
    widths = []
    original = proposer.SdfpProposer._sample_draft_tokens

    def watched(self: Any, hidden: Any, sampling: Any) -> Any:
        tokens, probs = original(self, hidden, sampling)
        widths.append((probs > 0).sum(-1).max().item())
        assert (probs.gather(1, tokens[:, None]) > 0).all()
        return tokens, probs

    monkeypatch.setattr(proposer.SdfpProposer, "_sample_draft_tokens", watched)
    generate(llm, prompts[:4], temperature=1.0, top_k=7)
    assert max(widths) == 7
    monkeypatch.setattr(draft_step, "cut", None)  # not called
    generate(llm, prompts[:4], temperature=1.0)
    assert max(widths) > 1_000


def test_with_top_k_1_text_is_the_greedy_text(llm, prompts):
    assert generate(llm, prompts[:8], temperature=1.0, top_k=1) == generate(llm, prompts[:8], temperature=0.0)


def test_a_paced_draft_is_as_sure_as_it_was_before_the_cut(target, kept, prompts, tmp_path, monkeypatch):
    """Else with top_k = 1 every draft would look certain, and none be told from another."""
    plan = write_plan(target, tmp_path, kept, k=3, pacing=pacing_by_hand())
    seen: list[float] = []
    original = proposer.SdfpProposer._sample_with_confidence

    def watched(self: Any, hidden: Any, sampling: Any) -> DraftStep:
        step = original(self, hidden, sampling)
        seen.extend(step.confidence.tolist())  # type: ignore[union-attr]
        return step

    monkeypatch.setattr(proposer.SdfpProposer, "_sample_with_confidence", watched)
    with engine(target, {"method": "sdfp", "model": plan, "ngram": False}) as llm:
        runner(llm).drafter.pacer.timed = False
        generate(llm, prompts[:8], temperature=1.0, top_k=1)
    assert len(seen) > 20 and min(seen) < 0.5 and max(seen) > 0.9

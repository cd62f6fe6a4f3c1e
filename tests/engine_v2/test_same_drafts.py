"""One plan, two runners, the same drafts; and our sampling kernel draws what upstream's draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, runner, tokens

pytestmark = pytest.mark.engine


def drafts_of(llm: Any, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """What the engine proposes, round by round, one request at a time."""
    drafts: list[list[int]] = []
    made = runner(llm)
    proposer = getattr(made, "drafter", None) or made.speculator
    propose = proposer.propose

    def spy(*args: Any, **kwargs: Any) -> Any:
        out = propose(*args, **kwargs)
        drafts.append(out[0].tolist())
        return out

    proposer.propose = spy
    tokens(llm, prompts, batch=1, max_tokens=16, **params)
    proposer.propose = propose
    return drafts


def greedy_drafts(target: Path, plan: str, prompts: list[list[int]]) -> list[list[int]]:
    """`drafts_of` an engine of the runner now configured."""
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        return drafts_of(llm, prompts)


def test_v1_and_v2_draft_the_same_tokens(
    target: Path, plan: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    some = [p[:50] for p in prompts[:4]]
    v2 = greedy_drafts(target, plan, some)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    v1 = greedy_drafts(target, plan, some)
    assert len(v1) > 8 and all(len(round_) == 3 for round_ in v1)
    assert v2 == v1


def test_upstreams_sampler_draws_the_same_tokens(
    target: Path, plan: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """The path for watermarks and acceptance estimates, and with it the noise and its key."""
    some = [p[:50] for p in prompts[:2]]
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        ours = [drafts_of(llm, some, temperature=t, seed=7) for t in (0.0, 1.0)]
        monkeypatch.setattr(type(runner(llm).speculator), "_samples_upstream", True)
        llm.reset_prefix_cache()
        upstreams = [drafts_of(llm, some, temperature=t, seed=7) for t in (0.0, 1.0)]
    assert ours[0] != ours[1] and len(ours[1]) > 8
    assert upstreams == ours

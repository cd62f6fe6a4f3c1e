"""Features that touch what is verified, on the V2 runner: the same ids as plain vLLM's on the same runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine, spec_counters

pytestmark = pytest.mark.engine

PATTERN = r"def [a-z]{3,8}\(self\):"


def features(prompts: list[list[int]]) -> dict[str, Any]:
    """Name -> sampling parameters, one request each, all in one batch."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    common = dict(temperature=0.0, max_tokens=16, ignore_eos=True)
    return {
        "plain": SamplingParams(**common),
        "logprobs": SamplingParams(logprobs=2, prompt_logprobs=1, **common),
        "penalties": SamplingParams(
            repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3, **common
        ),
        "bad words": SamplingParams(bad_words=["self", "return"], **common),
        "allowed tokens": SamplingParams(allowed_token_ids=list(range(100, 400)), **common),
        "one token": SamplingParams(temperature=0.0, max_tokens=1),
        "stop tokens": SamplingParams(temperature=0.0, max_tokens=16, stop_token_ids=list(range(5, 40))),
        "grammar": SamplingParams(
            temperature=0.0, max_tokens=16, structured_outputs=StructuredOutputsParams(regex=PATTERN)
        ),
    }


def answers(llm: Any, prompts: list[list[int]]) -> dict[str, tuple[list[int], list[dict[int, float]]]]:
    """Ids, and what logprobs were asked for, by feature."""
    asked = features(prompts)
    inputs = [{"prompt_token_ids": p} for p in prompts[: len(asked)]]
    out = llm.generate(inputs, list(asked.values()), use_tqdm=False)
    return {
        name: (
            list(o.outputs[0].token_ids),
            [{i: p.logprob for i, p in step.items()} for step in o.outputs[0].logprobs or []],
        )
        for name, o in zip(asked, out, strict=True)
    }


def test_same_ids_with_every_feature_in_one_batch(target: Path, plan: str, prompts: list[list[int]]):
    some = [p[:40] for p in prompts[:8]]
    with engine(target) as llm:
        expected = answers(llm, some)
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        got = answers(llm, some)
        assert spec_counters(llm)["num_accepted_tokens"] > 8
    for name, (ids, logprobs) in expected.items():
        assert got[name][0] == ids, name
        for step, want in zip(got[name][1], logprobs, strict=True):
            assert step == pytest.approx(want, abs=1e-4), name

"""Greedy output with quantised weights and a quantised KV cache, where vLLM has CPU kernels for them.

Rounding makes steps of a tiny difference: where a sum's last bit lands on the other side, a whole
int8 or fp8 step follows. So plain vLLM's own answers may turn at a near-tie when batches change
their shape, and an answer may differ here from a token on that plain vLLM almost chose instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import assert_identical, engine, spec_counters, write_plan
from tests.support.quantised import quantise
from tests.support.window_reads import watched

pytestmark = pytest.mark.engine

NEAR_TIE = 0.05  # difference of log-probabilities; half of all tokens are chosen by more than 1
CASES: dict[str, tuple[str | None, dict[str, Any], dict[str, Any]]] = {  # weights, engine, speculative_config
    "int8 weights and activations": ("w8a8", {}, {}),
    "int4 weights": ("w4a16", {"dtype": "bfloat16"}, {}),  # vLLM has no float32 kernel for these
    "fp8 KV cache": (None, {"kv_cache_dtype": "fp8"}, {}),
    "a window of an fp8 KV cache": (None, {"kv_cache_dtype": "fp8", "block_size": 32}, {"window": 20}),
}
# For int4 weights and fp8 KV caches vLLM has kernels on x86 with AVX-512 alone.
NEED_AVX512 = pytest.mark.skipif(
    torch.cpu._is_avx2_supported() and not torch.cpu._is_avx512_supported(),
    reason="vLLM needs AVX-512 for these",
)


def answers(llm, prompts) -> list[list[dict[int, float]]]:
    """For each prompt, for each token generated: it, then the likeliest, with their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, logprobs=5)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        [
            {token: row[token].logprob} | {t: lp.logprob for t, lp in row.items()}
            for token, row in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
        ]
        for o in out
    ]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c.startswith("int8") else NEED_AVX512) for c in CASES]
)
def test_same_tokens_but_for_near_ties(target, prompts, kept, tmp_path, case):
    scheme, settings, drafting = CASES[case]
    model: Path = quantise(target, tmp_path / "model", scheme) if scheme else target
    plan = write_plan(model, tmp_path / "plan", kept, k=3)
    with engine(model, **settings) as llm:
        plain = answers(llm, prompts[:24])
    with (
        engine(model, {"method": "sdfp", "model": plan, **drafting}, **settings) as llm,
        watched(llm) as reads,
    ):
        got = [[next(iter(row)) for row in answer] for answer in answers(llm, prompts[:24])]
        counters = spec_counters(llm)
    assert 0 < counters["num_accepted_tokens"] < counters["num_draft_tokens"]
    assert reads.wrong == []
    assert reads.gapped > 50 if drafting else reads.gapped == 0
    want = [[next(iter(row)) for row in answer] for answer in plain]
    same = [i for i in range(len(want)) if got[i] == want[i]]
    assert_identical([got[i] for i in same], [want[i] for i in same])
    print(f"{case}: {len(same)} of {len(want)} answers identical")
    assert len(same) >= 0.8 * len(want)
    for i in set(range(len(want))) - set(same):
        turn = next(t for t in range(len(want[i])) if got[i][t] != want[i][t])
        row = plain[i][turn]
        assert row[want[i][turn]] - row.get(got[i][turn], -100.0) < NEAR_TIE, f"answer {i}, token {turn}"


def test_quantised_model_needs_a_plan_of_its_own(target, plan, tmp_path):
    from sdfp_vllm.errors import PlanError
    from sdfp_vllm.plan.fingerprint import fingerprint
    from sdfp_vllm.plan.store import load_plan

    model = quantise(target, tmp_path, "w8a8")
    with pytest.raises(PlanError, match="made for another model: sha256"):
        load_plan(plan, expected=fingerprint(model))

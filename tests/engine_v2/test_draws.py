"""Sampled text on the V2 runner follows the target's distribution exactly, drafts or no drafts.

Fewer draws than on the V1 runner, whose tests take 25,000 for each setting: the interpreter is slow.
Enough to catch verification against another distribution than the draft's, which the last test shows.
Top-k and top-p are upstream's on both sides of the comparison, and its kernel for them cannot be interpreted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.bigram import VOCAB, z_score
from tests.support.engines import engine, runner, spec_counters, write_plan
from tests.support.exact_sampling import THRESHOLD

pytestmark = pytest.mark.engine

SEQUENCES, LENGTH = 32, 40


SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=["probabilistic", pytest.param("greedy", marks=SLOW)])
def llm(request: Any, bigram: Any, tmp_path_factory: Any) -> Any:
    """Drafts that are sampled ("probabilistic") and one-hot ("greedy")."""
    plan = write_plan(bigram, tmp_path_factory.mktemp("plan"), [0, 3], k=3)
    settings = {"method": "sdfp", "model": plan, "draft_sample_method": request.param}
    with engine(bigram, settings, max_model_len=64, max_num_seqs=32, skip_tokenizer_init=True) as llm:
        yield llm


def draw(llm: Any, **params: Any) -> torch.Tensor:
    """Generated text, each request's prompt (one token) first: int64 [SEQUENCES, 1 + LENGTH]."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, detokenize=False, **params)
    prompts = [{"prompt_token_ids": [i % VOCAB]} for i in range(SEQUENCES)]
    out = llm.generate(prompts, sampling, use_tqdm=False)
    return torch.tensor([[i % VOCAB, *o.outputs[0].token_ids] for i, o in enumerate(out)])


@pytest.mark.parametrize(
    "params", [dict(temperature=1.0), pytest.param(dict(temperature=0.7), marks=SLOW)], ids=str
)
def test_transitions_follow_the_exact_distribution(llm: Any, exact: torch.Tensor, params: Any):
    """1,248 draws each."""
    before = spec_counters(llm)
    ids = draw(llm, **params)
    after = spec_counters(llm)
    accepted, drafted = (
        after[name] - before.get(name, 0) for name in ("num_accepted_tokens", "num_draft_tokens")
    )
    assert 0.05 * drafted < accepted < 0.95 * drafted, "the test needs both acceptances and rejections"
    z = z_score(ids, exact, **params)
    print(f"{params}: {accepted / drafted:.2f} accepted, z {z:.2f}")
    assert z < THRESHOLD


def test_a_wrong_draft_distribution_is_caught(llm: Any, exact: torch.Tensor):
    """Verification that takes sampled drafts to come from flatter logits than they did."""
    speculator = runner(llm).speculator
    if speculator.draft_logits is None:
        pytest.skip("one-hot drafts have no distribution to get wrong")
    generate = speculator._generate_draft

    def flatter(*args: Any, **kwargs: Any) -> None:
        generate(*args, **kwargs)
        step = int(speculator.current_draft_step)
        speculator.draft_logits[:, step] *= 0.5

    speculator._generate_draft = flatter
    try:
        z = z_score(draw(llm, temperature=1.0), exact)
    finally:
        speculator._generate_draft = generate
    print(f"broken: z {z:.1f}")
    assert z > THRESHOLD

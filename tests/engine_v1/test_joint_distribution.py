"""The joint distribution of an answer's first three tokens, over 20,480 draws, with real attention.

The vocabulary is eight tokens, so the 512 outcomes' exact probabilities come from 73 forward
passes of the reference implementation. The first token is the prefill's; the second and the
third are drafted, by layers that often disagree with the target (about a third is accepted).
Plain vLLM's draws are held to the same probabilities, and ours are compared with them directly.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.bigram import VOCAB, tiny_llama
from tests.support.engines import engine, spec_counters, write_plan
from tests.support.exact_sampling import (
    THRESHOLD,
    distribution,
    penalised,
    total_variation,
    z_between,
    z_of_counts,
)

pytestmark = [pytest.mark.engine, pytest.mark.more]

PROMPT = [1, 5, 2, 2, 7, 0]
ANSWERS, REQUESTS = 4096, 5
CASES = {
    "temperature 1": dict(temperature=1.0),
    "temperature 0.7, top-p and penalties": dict(
        temperature=0.7, top_p=0.95, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3
    ),
}
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SETTINGS = dict(
    max_model_len=128, max_num_seqs=512, max_num_batched_tokens=4096, skip_tokenizer_init=True, seed=0
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    model = tiny_llama(seed=0, num_key_value_heads=1)
    with torch.no_grad():
        for p in model.model.layers.parameters():
            if p.ndim > 1:
                p.normal_(std=0.25)
        model.model.embed_tokens.weight.normal_(std=1.0)
        model.lm_head.weight.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("attentive")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exact(model) -> dict[str, torch.Tensor]:
    """Probabilities of the 512 answers, float64 [512], by case."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = F.one_hot(torch.tensor(PROMPT), VOCAB).sum(0)

    def answers(**params) -> torch.Tensor:
        penalties = {name: params.pop(name) for name in _PENALTIES if name in params}
        probs, answers = torch.ones(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.int64)
        for _ in range(3):
            ids = torch.cat([torch.tensor(PROMPT).expand(len(answers), -1), answers], 1)
            with torch.no_grad():
                logits = reference(ids).logits[:, -1].double()
            output = F.one_hot(answers, VOCAB).sum(1)
            step = distribution(penalised(logits, prompt, output, **penalties), **params)
            probs = (probs[:, None] * step).flatten()
            answers = torch.cat(
                [answers.repeat_interleave(VOCAB, 0), torch.arange(VOCAB).repeat(len(answers))[:, None]], 1
            )
        return probs

    return {name: answers(**params) for name, params in CASES.items()}


def draw(llm, **params) -> torch.Tensor:
    """Counts of the 512 answers, int64 [512]."""
    from vllm import SamplingParams

    sampling = SamplingParams(n=ANSWERS, max_tokens=3, ignore_eos=True, detokenize=False, **params)
    out = llm.generate([{"prompt_token_ids": PROMPT}] * REQUESTS, sampling, use_tqdm=False)
    ids = torch.tensor([list(o.token_ids) for request in out for o in request.outputs])
    return torch.bincount(ids @ torch.tensor([VOCAB * VOCAB, VOCAB, 1]), minlength=VOCAB**3)


@pytest.fixture(scope="module")
def plain(model) -> dict[str, torch.Tensor]:
    with engine(model, **SETTINGS) as llm:
        return {name: draw(llm, **params) for name, params in CASES.items()}


@pytest.fixture(scope="module", params=["probabilistic", "greedy"])
def llm(request, model, plain, tmp_path_factory):
    """Drafts that are sampled ("probabilistic") and one-hot ("greedy")."""
    plan = write_plan(model, tmp_path_factory.mktemp("plan"), [0, 3], k=2)
    speculative = {"method": "sdfp", "model": plan, "draft_sample_method": request.param}
    with engine(model, speculative, **SETTINGS) as llm:
        yield llm


@pytest.mark.parametrize("case", CASES)
def test_plain_vllm_draws_from_what_we_hold_exact(plain, exact, case):
    assert z_of_counts(plain[case], exact[case]) < THRESHOLD


@pytest.mark.parametrize("case", CASES)
def test_answers_are_drawn_as_plain_vllm_draws_them(llm, plain, exact, case):
    before = spec_counters(llm)
    counts = draw(llm, **CASES[case])
    after = spec_counters(llm)
    accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    drafted = after["num_draft_tokens"] - before["num_draft_tokens"]
    assert 0.05 * drafted < accepted < 0.95 * drafted, "the test needs both acceptances and rejections"
    p = exact[case]
    noise = (p * (1 - p) / (math.pi * counts.sum())).sqrt().sum().item()  # E[TV] of two such samples
    print(
        f"{case}: {counts.sum()} draws, {accepted / drafted:.2f} accepted, z {z_of_counts(counts, p):.2f}; "
        f"to plain vLLM's: z {z_between(counts, plain[case]):.2f}, "
        f"total variation {total_variation(counts, plain[case]):.4f} (noise {noise:.4f})"
    )
    assert z_of_counts(counts, p) < THRESHOLD
    assert z_between(counts, plain[case]) < THRESHOLD


def test_the_test_has_power(llm, plain, exact, monkeypatch):
    """Accepting every draft with a probability two points too high must be caught, both ways."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.generate_uniform_probs
    monkeypatch.setattr(rejection_sampler, "generate_uniform_probs", lambda *a, **k: original(*a, **k) - 0.02)
    case = "temperature 1"
    counts = draw(llm, **CASES[case])
    print(f"broken: z {z_of_counts(counts, exact[case]):.1f}, to plain {z_between(counts, plain[case]):.1f}")
    assert z_of_counts(counts, exact[case]) > 2 * THRESHOLD
    assert z_between(counts, plain[case]) > THRESHOLD

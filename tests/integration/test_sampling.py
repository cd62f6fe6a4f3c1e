"""Sampled output follows the target's distribution exactly, drafts or no drafts.

The model here is a bigram model in a Llama's clothes: attention outputs are zero, so the next
token depends on the last one alone, and every generated token is one more draw from one of
`VOCAB` known distributions. That gives a chi-square test against the *exact* probabilities with
a hundred thousand draws in seconds, enough to catch an acceptance rule that is two points off,
which `test_the_test_has_power` shows.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from engines import engine, runner, spec_counters, write_plan

pytestmark = pytest.mark.engine

VOCAB = 8
SEQUENCES, LENGTH = 1024, 100
THRESHOLD = 4.0  # standard deviations of chi-square: a right sampler passes it once in 10,000 runs or so


@pytest.fixture(scope="module")
def bigram(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.normal_(std=0.25)
            layer.mlp.gate_proj.weight.normal_(std=0.25)
            layer.mlp.up_proj.weight.normal_(std=0.25)
        model.model.embed_tokens.weight.normal_(std=1.0)
        model.lm_head.weight.normal_(std=0.12)
    folder = tmp_path_factory.mktemp("bigram")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exact(bigram) -> torch.Tensor:
    """Logits of the next token after each token: float64 [VOCAB, VOCAB]."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(bigram, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(VOCAB)[:, None]).logits[:, -1].double()


@pytest.fixture(scope="module")
def llm(request, bigram, tmp_path_factory):
    plan = write_plan(bigram, tmp_path_factory.mktemp("plan"), [0, 3], k=3)
    settings = {"method": "sdfp", "model": plan, "draft_sample_method": request.param}
    with engine(bigram, settings, max_model_len=128, max_num_seqs=256, skip_tokenizer_init=True) as llm:
        yield llm


def transitions(llm, sequences: int = SEQUENCES, **params) -> torch.Tensor:
    """Counts of (token, next token) over generated text, without each request's first pair (not drafted): [V, V]."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, detokenize=False, **params)
    prompts = [{"prompt_token_ids": [i % VOCAB]} for i in range(sequences)]
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for request in llm.generate(prompts, sampling, use_tqdm=False):
        ids = torch.tensor(request.outputs[0].token_ids)
        counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1, dtype=torch.float64), accumulate=True)
    return counts


def z_score(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square of the counts given their row sums, in standard deviations above its mean."""
    expected = counts.sum(1, keepdim=True) * probs
    assert counts[probs == 0].sum() == 0, "a token outside the allowed set was sampled"
    cells = (expected > 5).double()
    chi2 = ((counts - expected) ** 2 / expected.clamp_min(1e-300) * cells).sum().item()
    freedom = (cells.sum(1) - 1).clamp_min(0).sum().item()
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def distribution(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """What vLLM promises to sample from: temperature, then top-k, then top-p."""
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[:, -1:], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


@pytest.mark.parametrize(
    ("llm", "params"),
    [
        ("probabilistic", dict(temperature=0.7)),
        ("probabilistic", dict(temperature=1.5)),
        ("probabilistic", dict(temperature=1.0, top_k=3)),
        ("probabilistic", dict(temperature=0.7, top_k=5, top_p=0.8)),
        ("greedy", dict(temperature=1.0)),
        ("greedy", dict(temperature=1.0, top_p=0.7)),
    ],
    indirect=["llm"],
    ids=str,
)
def test_transitions_follow_the_exact_distribution(llm, exact, params):
    """100,000 draws each, with drafts that are sampled ("probabilistic") and one-hot ("greedy")."""
    before = spec_counters(llm)
    counts = transitions(llm, **params)
    after = spec_counters(llm)
    accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    drafted = after["num_draft_tokens"] - before["num_draft_tokens"]
    assert counts.sum() > 100_000
    assert 0.05 * drafted < accepted < 0.95 * drafted, "the test needs both acceptances and rejections"
    assert z_score(counts, distribution(exact, **params)) < THRESHOLD


@pytest.mark.parametrize("llm", ["probabilistic"], indirect=True)
def test_the_test_has_power(llm, exact, monkeypatch):
    """Accepting every draft with a probability two points too high must be caught."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.generate_uniform_probs
    monkeypatch.setattr(rejection_sampler, "generate_uniform_probs", lambda *a, **k: original(*a, **k) - 0.02)
    assert z_score(transitions(llm, temperature=1.0), distribution(exact)) > THRESHOLD


@pytest.mark.parametrize("llm", ["probabilistic"], indirect=True)
def test_greedy_and_sampled_requests_in_one_batch(llm, exact):
    from vllm import SamplingParams

    common = dict(max_tokens=40, ignore_eos=True, detokenize=False)
    params = [SamplingParams(temperature=float(i % 2), **common) for i in range(64)]
    prompts = [{"prompt_token_ids": [i % VOCAB]} for i in range(64)]
    out = llm.generate(prompts, params, use_tqdm=False)
    best = exact.argmax(-1).tolist()
    for i in range(0, 64, 2):
        ids = [i % VOCAB, *out[i].outputs[0].token_ids]
        assert ids[1:] == [best[t] for t in ids[:-1]]


@pytest.mark.slow
def test_joint_distribution_of_two_tokens_with_attention(target, plan):
    """The real target: P(second token | first) against plain vLLM over 20,000 pairs at low temperature.

    Compares two samples (SDFP, plain) by total variation; two halves of plain give the noise level.
    """
    from collections import Counter

    from vllm import SamplingParams

    prompt = {"prompt_token_ids": list(range(40, 60))}
    sampling = SamplingParams(n=1000, max_tokens=3, temperature=0.4, ignore_eos=True, detokenize=False)

    def draw(llm, rounds):
        pairs: Counter = Counter()
        for request in llm.generate([prompt] * rounds, sampling, use_tqdm=False):
            pairs.update(tuple(o.token_ids[1:3]) for o in request.outputs)
        return pairs

    def distance(a: Counter, b: Counter) -> float:
        na, nb = sum(a.values()), sum(b.values())
        return 0.5 * sum(abs(a[x] / na - b[x] / nb) for x in a.keys() | b.keys())

    settings = dict(max_num_seqs=256)
    with engine(target, **settings) as llm:
        one, two = draw(llm, 20), draw(llm, 20)
    with engine(target, {"method": "sdfp", "model": plan}, **settings) as llm:
        ours = draw(llm, 20)
        assert runner(llm).drafter is not None
    assert distance(ours, one) < 1.25 * distance(one, two) + 0.005

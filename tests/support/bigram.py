"""A bigram model in a Llama's clothes: its next token depends on the last one alone.

Attention outputs are zero, so every generated token is one more draw from one of `VOCAB` known
distributions, which makes exact chi-square tests of sampled text cheap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.exact_sampling import distribution, penalised, z_of_draws

VOCAB = 8


def tiny_llama(seed: int, num_key_value_heads: int) -> Any:
    """An untrained Llama of four layers over `VOCAB` tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=num_key_value_heads,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture(scope="module")
def bigram(tmp_path_factory) -> Path:
    model = tiny_llama(seed=7, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.normal_(std=0.25)
            layer.mlp.gate_proj.weight.normal_(std=0.25)
            layer.mlp.up_proj.weight.normal_(std=0.25)
        model.model.embed_tokens.weight.normal_(std=1.0)
        model.lm_head.weight.normal_(std=0.3)
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


def z_score(ids: torch.Tensor, logits: torch.Tensor, **params) -> float:
    """How far `draw`n text is from the exact distribution given what came before, all but first tokens
    (these are not drafted): standard deviations of chi-square, draws counted by the token before."""
    penalties = {name: params.pop(name) for name in list(params) if name.endswith("_penalty")}
    prompt, generated = ids[:, :1], ids[:, 1:]
    probs = logits[ids[:, :-1]]
    if penalties:
        output = F.one_hot(generated, VOCAB).cumsum(1) - F.one_hot(generated, VOCAB)
        probs = penalised(probs, F.one_hot(prompt, VOCAB), output, **penalties)
    probs = distribution(probs, **params)[:, 1:]
    return z_of_draws(probs.flatten(0, 1), generated[:, 1:].flatten(), ids[:, 1:-1].flatten())

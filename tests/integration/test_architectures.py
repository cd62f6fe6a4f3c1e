"""The runtime reaches the layers of each architecture: tiny random models on the real engine.

Random weights say nothing about acceptance; what is checked is that greedy output is plain
vLLM's, and that a draft with every layer kept is always accepted, which fails if embedding
scaling, norms, rotary positions, sliding windows or the head differ from the target's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from engines import assert_identical, engine, spec_counters, tokens, write_plan

from sdfp_vllm.plan.keep import SUBLAYER_ARCHITECTURES, KeepSet

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from tiny_models import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.engine

# Attention heads of a size vLLM's CPU kernels take, and blocks with room to cross a sliding window.
_SIZES = dict(hidden_size=64, intermediate_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
# vLLM takes Qwen's sliding window on all layers or none.
_NO_WINDOW = dict(use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * 4)
_CHANGES = {
    "gemma3_text": dict(query_pre_attn_scalar=32, sliding_window=32),
    "mistral": dict(sliding_window=32),
    "qwen2": _NO_WINDOW,
    "qwen3": _NO_WINDOW,
    "qwen3_moe": dict(moe_intermediate_size=64),
}
_PROMPTS = [[(11 * i + 7 * j) % 57 + 3 for j in range(n)] for i, n in enumerate((2, 9, 33, 70, 120))]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    changes = _SIZES | dict(max_position_embeddings=256) | _CHANGES.get(request.param, {})
    tiny_model(request.param, seed=0, **changes).save_pretrained(folder)
    return folder


def test_same_tokens_and_full_acceptance(model, tmp_path):
    from sdfp_vllm.plan.fingerprint import fingerprint

    layers = fingerprint(model).num_layers
    kept = KeepSet((0, layers - 1))
    if fingerprint(model).architecture in SUBLAYER_ARCHITECTURES:
        kept = KeepSet(layers=(layers - 1,), attention=(0,), mlp=(1, 2))
    some = write_plan(model, tmp_path / "some", kept, k=3)
    everything = write_plan(model, tmp_path / "all", range(layers), k=3)
    settings = dict(max_model_len=192, skip_tokenizer_init=True)
    with engine(model, **settings) as llm:
        want = tokens(llm, _PROMPTS)
    with engine(model, {"method": "sdfp", "model": some}, **settings) as llm:
        assert_identical(tokens(llm, _PROMPTS), want)
        assert spec_counters(llm)["num_draft_tokens"] > 0
    with engine(model, {"method": "sdfp", "model": everything}, **settings) as llm:
        assert_identical(tokens(llm, _PROMPTS), want)
        counters = spec_counters(llm)
    assert counters["num_accepted_tokens"] >= 0.97 * counters["num_draft_tokens"]

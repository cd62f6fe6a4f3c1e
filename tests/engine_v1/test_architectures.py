"""The runtime reaches the layers of each architecture: tiny random models on the real engine.

Random weights say nothing about acceptance; what is checked is that greedy output is plain
vLLM's, and that a draft with every layer kept is always accepted, which fails if embedding
scaling, norms, rotary positions, sliding windows or the head differ from the target's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from sdfp_vllm.engine.draft.rounded_linear import refusal
from sdfp_vllm.engine.draft.twins import copies_of
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.families import FAMILIES, SUBLAYER_ARCHITECTURES
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import BRANCHES, DraftView
from tests.support.engines import assert_identical, engine, runner, spec_counters, tokens, write_plan
from tests.support.tiny_models import ALL_ARCHITECTURES, IN_ENGINE, VOCAB, tiny_model

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
    "gemma2": dict(query_pre_attn_scalar=32, sliding_window=32),
    "gpt_oss": dict(sliding_window=32),
    "qwen2_moe": dict(moe_intermediate_size=64, shared_expert_intermediate_size=64),
}
_MODELS = [pytest.param(a, marks=[] if a in IN_ENGINE else pytest.mark.slow) for a in ALL_ARCHITECTURES]
_PROMPTS = [[(11 * i + 7 * j) % 57 + 3 for j in range(n)] for i, n in enumerate((2, 9, 33, 70, 120))]


@pytest.fixture(scope="module", params=_MODELS)
def model(request, tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    changes = _SIZES | dict(max_position_embeddings=256) | _CHANGES.get(request.param, {})
    made = tiny_model(request.param, seed=0, **changes)
    made.save_pretrained(folder)
    with as_it_was(type(made.base_model)):
        yield folder


@contextlib.contextmanager
def as_it_was(decoder: type) -> Iterator[None]:
    """Undoes what vLLM does to the classes of transformers that it runs itself: for good, in this process."""
    bases, attributes = decoder.__bases__, dict(vars(decoder))
    try:
        yield
    finally:
        decoder.__bases__ = bases
        for name, value in dict(vars(decoder)).items():
            if name not in attributes:
                delattr(decoder, name)
            elif value is not attributes[name]:
                setattr(decoder, name, attributes[name])


def test_same_tokens_and_full_acceptance(model, tmp_path):
    from sdfp_vllm.plan.fingerprint import fingerprint

    architecture = fingerprint(model).architecture
    layers = fingerprint(model).num_layers
    kept = KeepSet((0, layers - 1))
    if architecture in SUBLAYER_ARCHITECTURES:
        kept = KeepSet(layers=(layers - 1,), attention=(0,), mlp=(1, 2))
    # Rounded copies are found by name and put in place by attribute: both are the family's. Experts have none.
    rounded = FAMILIES[architecture].call == "forward" and refusal("int8", torch.float32, 64, 64) is None
    if rounded:
        branches = ("attention",) if architecture == "GptOssForCausalLM" else BRANCHES
        kept = DraftView.at(kept, {(b, i): "int8" for b in branches for i in kept.layers})
    some = write_plan(model, tmp_path / "some", kept, k=3)
    everything = write_plan(model, tmp_path / "all", range(layers), k=3)
    settings = dict(max_model_len=192, skip_tokenizer_init=True)
    with engine(model, **settings) as llm:
        want = tokens(llm, _PROMPTS)
    with engine(model, {"method": "sdfp", "model": some}, **settings) as llm:
        assert_identical(tokens(llm, _PROMPTS), want)
        assert spec_counters(llm)["num_draft_tokens"] > 0
        assert (copies_of(runner(llm).drafter.model) > 0) == rounded
    with engine(model, {"method": "sdfp", "model": everything}, **settings) as llm:
        assert_identical(tokens(llm, _PROMPTS), want)
        counters = spec_counters(llm)
        draft, target = runner(llm).drafter.model, runner(llm).model
        used = {t.untyped_storage().data_ptr() for t in draft.parameters()}
        assert used and used <= {t.untyped_storage().data_ptr() for t in target.parameters()}
    assert counters["num_accepted_tokens"] >= 0.97 * counters["num_draft_tokens"]


def test_an_untried_family_whose_layers_take_something_else_is_refused_when_it_is_loaded(tmp_path):
    shape = dict(vocab_size=VOCAB, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1)
    del (sizes := dict(_SIZES))["head_dim"]
    model = GraniteMoeForCausalLM(GraniteMoeConfig(**sizes, **shape, max_position_embeddings=256))
    model.save_pretrained(tmp_path / "model")
    plan = write_plan(tmp_path / "model", tmp_path / "plan", [0], k=3)
    refused = r"GraniteMoeForCausalLM: has decoder layers .* that take \(positions, hidden_states\).*compatibility.md"
    with (
        pytest.raises(SdfpError, match=refused),
        engine(
            tmp_path / "model", {"method": "sdfp", "model": plan}, max_model_len=192, skip_tokenizer_init=True
        ),
    ):
        pass

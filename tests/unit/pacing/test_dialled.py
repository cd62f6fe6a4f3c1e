"""Random checkpoints with acceptance on a dial: what the dial's ends do, and that weights repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.studies.dialled import dialled
from sdfp_vllm.planner.stack import DecoderStack, load_target

SHAPE = dict(
    model_type="qwen3",
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    tie_word_embeddings=True,
)
KEEP = [0, 3]


def agreement(folder: Path) -> float:
    """How often the kept layers alone choose the model's token."""
    stack = DecoderStack(load_target(folder, torch.float32))
    ids = torch.randint(0, 2048, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (stack.logits(ids).argmax(-1) == stack.logits(ids, KEEP).argmax(-1)).double().mean().item()


def test_the_dial(tmp_path):
    always, often, seldom = (
        agreement(dialled(tmp_path / str(scale), SHAPE, KEEP, scale)) for scale in (0.0, 0.05, 1.0)
    )
    assert always == 1.0 > often > seldom and often > 0.4 and seldom < 0.2


def test_weights_repeat_and_differ_in_what_is_dialled_only(tmp_path):
    first = dialled(tmp_path / "a", SHAPE, KEEP, 0.1)
    same, other = dialled(tmp_path / "b", SHAPE, KEEP, 0.1), dialled(tmp_path / "c", SHAPE, KEEP, 0.2)
    weights = [load_file(f / "model.safetensors") for f in (first, same, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])}
    assert changed == {
        f"model.layers.{i}.{part}.weight" for i in (1, 2) for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert dialled(first, SHAPE, KEEP, 0.1) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written  # it lay there already
    dialled(first, SHAPE, KEEP, 0.1, seed=1)
    assert not torch.equal(
        load_file(first / "model.safetensors")["model.embed_tokens.weight"],
        weights[0]["model.embed_tokens.weight"],
    )


def test_skew_makes_low_ids_common(tmp_path):
    stack = DecoderStack(load_target(dialled(tmp_path / "m", SHAPE, KEEP, 0.1, skew=0.3), torch.float32))
    ids = torch.randint(0, 2048, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        chosen = stack.logits(ids).argmax(-1)
    assert (chosen < 512).double().mean() == pytest.approx(0.8, abs=0.2)  # a quarter of the ids

"""Widening keeps the function: logits, greedy text, tied embeddings; and refuses what it cannot hold."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sdfp_vllm.errors import SdfpError
from tests.toy.widen import widen, widened_bytes

WIDE = dict(hidden=96, mlp=200, heads=12, kv_heads=3)


def checkpoint(folder: Path, *, heads: int = 6, kv_heads: int = 2, tied: bool = True, **overrides) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-3,
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, p in model.named_parameters():
        if "norm" in name:  # trained norms are not ones
            torch.nn.init.uniform_(p, 0.3, 3.0)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | overrides))
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(61, (3, 48), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "wide"),
    [
        (6, 2, WIDE),  # grouped queries, groups of 3 become groups of 4
        (6, 1, dict(hidden=36, mlp=41, heads=12, kv_heads=2)),  # one shared key/value head becomes two
        (3, 3, dict(hidden=65, mlp=64, heads=5, kv_heads=5)),  # multi-head
        (6, 2, dict(hidden=24, mlp=40, heads=6, kv_heads=2)),  # nothing to add
    ],
)
def test_logits_are_the_originals(tmp_path, heads, kv_heads, tied, wide):
    src = checkpoint(tmp_path / "src", heads=heads, kv_heads=kv_heads, tied=tied)
    dst = widen(src, tmp_path / "dst", **wide, seed=0)
    want = logits(src)
    assert want.std() > 0.5  # so that 1e-4 means something
    torch.testing.assert_close(logits(dst), want, atol=1e-4, rtol=0)


def test_the_copy_has_the_shape_the_mark_and_the_size_announced(tmp_path):
    src = checkpoint(tmp_path / "src")
    (src / "tokenizer.json").write_text("{}")
    (src / "state.pt").write_bytes(b"not a part of the model")
    dst = widen(src, tmp_path / "dst", **WIDE, seed=0)
    config = json.loads((dst / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (96, 200)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (12, 3, 8)
    assert config["sdfp_demo"]["cost_scaled"] is True
    assert config["sdfp_demo"]["from"]["hidden_size"] == 24
    assert {f.name for f in dst.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (dst / "state.pt").exists()
    weights = load_file(dst / "model.safetensors")
    assert "lm_head.weight" not in weights  # still tied
    written = sum(w.nbytes for w in weights.values())
    assert written == widened_bytes(
        json.loads((src / "config.json").read_text()), **WIDE, dtype=torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_added_weights_are_finite_and_never_denormal(tmp_path, dtype):
    dst = widen(checkpoint(tmp_path / "src"), tmp_path / "dst", **WIDE, dtype=dtype, seed=0)
    gate = load_file(dst / "model.safetensors")["model.layers.0.mlp.gate_proj.weight"]
    assert gate.dtype == dtype
    added = gate[40:].float().abs()
    assert added.isfinite().all()
    assert added.min() > 0.4 / math.sqrt(96) > torch.finfo(dtype).tiny
    assert added.max() < 1.6 / math.sqrt(96)


def test_same_seed_same_file_other_seed_other_file(tmp_path):
    src = checkpoint(tmp_path / "src")
    a, b, c = (widen(src, tmp_path / f"{i}", **WIDE, seed=seed) for i, seed in enumerate([5, 5, 6]))
    read = lambda d: (d / "model.safetensors").read_bytes()  # noqa: E731
    assert read(a) == read(b) != read(c)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(hidden=23), "hidden_size"),
        (dict(mlp=39), "intermediate_size"),
        (dict(kv_heads=1, heads=6), "num_key_value_heads"),
        (dict(hidden=100), "multiple of 12 heads"),
        (dict(kv_heads=5), "groups of 3"),  # 12 is not a multiple of 5
        (dict(heads=6, kv_heads=3), "groups of 3"),  # groups would shrink
        (dict(dtype=torch.int8), "dtype"),
    ],
)
def test_shapes_that_cannot_hold_the_original_are_refused(tmp_path, changed, message):
    src = checkpoint(tmp_path / "src")
    with pytest.raises(SdfpError, match=message):
        widen(src, tmp_path / "dst", **(WIDE | changed), seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["MistralForCausalLM"]},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"quantization_config": {"a": 1}},
    ],
)
def test_other_models_are_refused(tmp_path, config):
    with pytest.raises(SdfpError, match="Widen an unquantised Llama"):
        widen(checkpoint(tmp_path / "src", **config), tmp_path / "dst", **WIDE, seed=0)


def test_existing_folder_and_damaged_checkpoints_are_refused(tmp_path):
    src = checkpoint(tmp_path / "src")
    (tmp_path / "dst").mkdir()
    with pytest.raises(SdfpError, match="already exists"):
        widen(src, tmp_path / "dst", **WIDE, seed=0)
    weights = load_file(src / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, src / "model.safetensors")
    with pytest.raises(SdfpError, match=r"layers\.1\.mlp\.up_proj"):
        widen(src, tmp_path / "new", **WIDE, seed=0)
    (src / "model.safetensors").unlink()
    with pytest.raises(SdfpError, match=r"no \*\.safetensors"):
        widen(src, tmp_path / "new", **WIDE, seed=0)
    (src / "config.json").write_text("{")
    with pytest.raises(SdfpError, match=r"config\.json"):
        widen(src, tmp_path / "new", **WIDE, seed=0)


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    src = checkpoint(tmp_path / "src")
    weights = load_file(src / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(7, 7)  # found only when it is placed
    save_file(weights, src / "model.safetensors")
    with pytest.raises(SdfpError, match=r"up_proj\.weight: has shape"):
        widen(src, tmp_path / "dst", **WIDE, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_diagonal_fit_scores_are_the_originals(tmp_path):
    """Why the demo plans by the diagonal score: sum_j F_j theta_j^2 is blind to the added weights."""
    src = checkpoint(tmp_path / "src")
    dst = widen(src, tmp_path / "dst", **WIDE, seed=0)
    ids = torch.randint(61, (1, 40), generator=torch.Generator().manual_seed(3))

    def scores(folder: Path) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model(ids, labels=ids).loss.backward()
        return [
            sum(float((p.grad * p.detach()).square().sum()) for p in layer.parameters())
            for layer in model.model.layers
        ]

    want = scores(src)
    assert scores(dst) == pytest.approx(want, rel=1e-3)
    assert max(want) > 1.1 * min(want)

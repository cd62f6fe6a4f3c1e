"""Function-preserving widening: the same model at the per-token cost of a larger one.

A model small enough to ship with a package spends its decode step in the engine's own
overhead, where no decoding method can show anything. `widen` gives such a model the
matrices of a larger one without changing what it computes:

* the residual stream gets extra channels that stay exactly zero, because everything that
  writes to it (embedding, o_proj, down_proj) writes zero there;
* extra MLP neurons and attention heads compute on random weights, and are read with zero
  weights by down_proj and o_proj;
* RMSNorm over D channels, of which d are alive, has mean(x^2) smaller by d / D; with eps
  scaled by d / D and the weight by sqrt(d / D), its output is the original's.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdfp_vllm.errors import SdfpError

# What each matrix maps from and to: (rows, columns). Those that read the residual stream may
# hold anything in their new entries; those that write it must hold zeros.
_READERS = {
    "self_attn.q_proj": ("q", "residual"),
    "self_attn.k_proj": ("kv", "residual"),
    "self_attn.v_proj": ("kv", "residual"),
    "mlp.gate_proj": ("mlp", "residual"),
    "mlp.up_proj": ("mlp", "residual"),
    "lm_head": ("vocab", "residual"),
}
_WRITERS = {
    "model.embed_tokens": ("vocab", "residual"),
    "self_attn.o_proj": ("residual", "q"),
    "mlp.down_proj": ("residual", "mlp"),
}
_NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")
_COPIED = ("tokenizer*", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
           "chat_template*", "vocab.json", "merges.txt")  # fmt: skip
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def widened_bytes(
    config: dict[str, Any], *, hidden: int, mlp: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> int:
    """Size in bytes of the weights that `widen` writes for a model with this config.json."""
    head_dim = _head_dim(config)
    layer = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * mlp + 2 * hidden
    vocab = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return (config["num_hidden_layers"] * layer + vocab + hidden) * dtype.itemsize


def widen(
    src: Path,
    dst: Path,
    *,
    hidden: int,
    mlp: int,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype = torch.float32,
    seed: int,
) -> Path:
    """Writes to `dst` a wider Llama checkpoint with the function of the one in `src`.

    Exact up to rounding in `dtype`: logits agree within 1e-4 in float32. Head size, layer
    count, vocabulary and tied embeddings stay. config.json gets an `sdfp_demo` entry that
    marks the copy as cost-scaled. Peak memory is one matrix; `dst` appears whole or not at all.

    Args:
        src: Folder of a Llama-architecture checkpoint in safetensors files.
        dst: Folder to make; must not exist.
        hidden: Channels of the residual stream; at least the original's.
        mlp: Neurons per MLP; at least the original's.
        heads: Query heads; a multiple of `kv_heads`.
        kv_heads: Key/value heads. Each must serve at least as many query heads as in the original.
        dtype: Of the weights written.
        seed: Of the random weights; the same seed gives the same file.

    Raises:
        SdfpError: If the checkpoint is not a plain Llama, the shape cannot hold it, or `dst` exists.
    """
    src, dst = Path(src), Path(dst)
    config = read_config(src)
    new = dict(
        hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    _check(src, config, new, dtype)
    if dst.exists():
        raise SdfpError(str(dst), "already exists", "Remove it, or choose another folder.")
    index = _tensor_files(src, config)
    missing = sorted(set(_tensor_names(config)) ^ index.keys())
    if missing:
        raise SdfpError(
            str(src),
            f"weights and config.json disagree on tensor {missing[0]}",
            "Use a checkpoint saved by transformers.",
        )
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}-"))
    try:
        for pattern in _COPIED:
            for file in src.glob(pattern):
                shutil.copy2(file, temporary)
        (temporary / "config.json").write_text(
            json.dumps(_new_config(config, new, dtype, seed), indent=1) + "\n"
        )
        _write(temporary / "model.safetensors", src, index, config, new, dtype, seed)
        temporary.chmod(0o755)
        os.rename(temporary, dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return dst


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a checkpoint folder. Raises SdfpError where it is missing or damaged."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SdfpError(str(path), f"cannot be read ({e})", "Give the folder of a saved model.") from e


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _check(src: Path, config: dict[str, Any], new: dict[str, int], dtype: torch.dtype) -> None:
    where, way_out = (
        str(src / "config.json"),
        "Widen an unquantised Llama-architecture checkpoint without biases.",
    )
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise SdfpError(where, f"architecture {config.get('architectures')} is not LlamaForCausalLM", way_out)
    for flag in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(flag):
            raise SdfpError(where, f"{flag} is set", way_out)
    if dtype not in _DTYPE_NAMES:
        raise SdfpError(
            "dtype", f"{dtype} is not a floating type of checkpoints", "Use float32, bfloat16 or float16."
        )
    for key, size in new.items():
        if size < config[key]:
            raise SdfpError(key, f"{size} is less than the original's {config[key]}", "Widening only adds.")
    heads, kv_heads = new["num_attention_heads"], new["num_key_value_heads"]
    if new["hidden_size"] % heads:
        what = f"{new['hidden_size']} is not a multiple of {heads} heads, which transformers asks for"
        raise SdfpError("hidden_size", what, "Choose a multiple.")
    old_group = config["num_attention_heads"] // config["num_key_value_heads"]
    if heads % kv_heads or heads // kv_heads < old_group:
        raise SdfpError(
            "heads and kv_heads",
            f"{heads} query heads over {kv_heads} key/value heads cannot hold groups of {old_group}",
            f"Choose heads as a multiple of kv_heads, at least {old_group} times it.",
        )


def _new_config(config: dict[str, Any], new: dict[str, int], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    ratio = config["hidden_size"] / new["hidden_size"]
    mark = {"cost_scaled": True, "from": {key: config[key] for key in new}, "seed": seed}
    name = str(dtype).removeprefix("torch.")
    kept = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype")}
    return kept | new | {
        "head_dim": _head_dim(config),
        "rms_norm_eps": config["rms_norm_eps"] * ratio,
        "torch_dtype": name,
        "sdfp_demo": mark,
    }  # fmt: skip


def _tensor_names(config: dict[str, Any]) -> Iterator[str]:
    yield "model.embed_tokens.weight"
    parts = [k for k in _READERS | _WRITERS if k.startswith(("self_attn", "mlp"))] + [*_NORMS[:2]]
    for i in range(config["num_hidden_layers"]):
        for part in parts:
            yield f"model.layers.{i}.{part}.weight"
    yield "model.norm.weight"
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight"


def _tensor_files(src: Path, config: dict[str, Any]) -> dict[str, Path]:
    """Which file holds each tensor that counts: rotary tables and a tied model's second copy of lm_head do not."""
    index = {}
    for file in sorted(src.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            index.update(dict.fromkeys(f.keys(), file))
    if not index:
        raise SdfpError(str(src), "has no *.safetensors file", "Save the model with safetensors.")
    ignored = (
        ("rotary_emb.inv_freq", "lm_head.weight")
        if config.get("tie_word_embeddings")
        else ("rotary_emb.inv_freq",)
    )
    return {k: v for k, v in index.items() if not k.endswith(ignored)}


def _places(config: dict[str, Any], new: dict[str, int]) -> dict[str, tuple[int, torch.Tensor]]:
    """For each axis: its new size, and the new position of each of the original's entries (int64)."""
    head_dim = _head_dim(config)
    old_group = config["num_attention_heads"] // config["num_key_value_heads"]
    new_group = new["num_attention_heads"] // new["num_key_value_heads"]
    # vLLM and transformers give query head h the key/value head h // group: keep the original pairs.
    heads = [(h // old_group) * new_group + h % old_group for h in range(config["num_attention_heads"])]
    q = (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()
    return {
        "q": (new["num_attention_heads"] * head_dim, q),
        "kv": (new["num_key_value_heads"] * head_dim, torch.arange(config["num_key_value_heads"] * head_dim)),
        "mlp": (new["intermediate_size"], torch.arange(config["intermediate_size"])),
        "residual": (new["hidden_size"], torch.arange(config["hidden_size"])),
        "vocab": (config["vocab_size"], torch.arange(config["vocab_size"])),
    }


def _write(
    path: Path,
    src: Path,
    index: dict[str, Path],
    config: dict[str, Any],
    new: dict[str, int],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Streams the safetensors file: length, JSON header, then one tensor after the other."""
    places = _places(config, new)
    shapes: dict[str, list[int]] = {}
    for name in _tensor_names(config):
        axes = _axes(name)
        shapes[name] = [places[a][0] for a in axes] if axes else [new["hidden_size"]]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = torch.Generator().manual_seed(seed)
    files = {file: safe_open(file, "pt") for file in set(index.values())}
    with path.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            old = files[index[name]].get_tensor(name).float()
            tensor = _widened(name, old, shape, places, rng).to(dtype).contiguous()
            out.write(tensor.view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _axes(name: str) -> tuple[str, str] | None:
    """Rows and columns of a matrix, None for a norm's vector."""
    part = name.removesuffix(".weight")
    return next((axes for key, axes in (_READERS | _WRITERS).items() if part.endswith(key)), None)


def _widened(
    name: str,
    old: torch.Tensor,
    shape: list[int],
    places: dict[str, tuple[int, torch.Tensor]],
    rng: torch.Generator,
) -> torch.Tensor:
    axes = _axes(name)
    if axes is None:
        ratio = math.sqrt(len(old) / shape[0])
        tensor = torch.full(shape, ratio)
        tensor[: len(old)] = old * ratio
        return tensor
    if any(name.removesuffix(".weight").endswith(key) for key in _READERS):
        tensor = _random(shape, rng)
    else:
        tensor = torch.zeros(shape)
    rows, columns = places[axes[0]][1], places[axes[1]][1]
    if old.shape != (len(rows), len(columns)):
        what = f"has shape {list(old.shape)}, config.json says {[len(rows), len(columns)]}"
        raise SdfpError(f"tensor {name}", what, "Use a checkpoint saved by transformers.")
    tensor[rows[:, None], columns] = old
    return tensor


def _random(shape: list[int], rng: torch.Generator) -> torch.Tensor:
    """Random signs times magnitudes in [0.5, 1.5) / sqrt(columns): bounded, and denormal in no floating type."""
    u = torch.rand(shape, generator=rng).mul_(2).sub_(1)
    return u.add_(torch.sign(u), alpha=0.5).mul_(shape[1] ** -0.5)

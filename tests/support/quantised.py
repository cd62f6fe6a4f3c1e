"""Quantised copies of a checkpoint, in the formats vLLM's CPU platform has kernels for (compressed-tensors)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32  # input features that share a scale in W4A16
_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
_ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES: dict[str, dict[str, Any]] = {
    "w8a8": {"format": "int-quantized", "weights": _WEIGHTS, "input_activations": _ACTIVATIONS},
    "w4a16": {
        "format": "pack-quantized",
        "weights": {**_WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": GROUP},
    },
}


def quantise(source: Path, folder: Path, scheme: str) -> Path:
    """Writes `source` with its decoder's linear layers rounded to nearest in `scheme`; returns `folder`."""
    chosen = SCHEMES[scheme]
    pack = {"w8a8": _int8_per_channel, "w4a16": _int4_in_groups}[scheme]
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." in name and weight.ndim == 2:
            stem = name.removesuffix(".weight")
            tensors.update({f"{stem}.{suffix}": t for suffix, t in pack(weight.float()).items()})
        else:
            tensors[name] = weight
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    config = json.loads((source / "config.json").read_text())
    group = {"targets": ["Linear"], **{k: v for k, v in chosen.items() if k != "format"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": chosen["format"],
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _int8_per_channel(weight: Tensor) -> dict[str, Tensor]:
    """[out, in] -> int8 of the same shape, one scale per output channel."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _int4_in_groups(weight: Tensor) -> dict[str, Tensor]:
    """[out, in] -> int32 [out, in / 8], eight values each from the lowest bits up, stored as value + 8."""
    out, width = weight.shape
    groups = weight.view(out, width // GROUP, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7
    values = (groups / scale).round().clamp(-8, 7).to(torch.int64).view(out, width // 8, 8) + 8
    packed = (values << (4 * torch.arange(8))).sum(2)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    shape = torch.tensor([out, width], dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scale.squeeze(2), "weight_shape": shape}

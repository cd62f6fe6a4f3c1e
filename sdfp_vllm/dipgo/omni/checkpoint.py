"""What diffusers would make of a checkpoint's denoisers: their layout and fingerprint, without loading the weights.

vLLM-Omni's own modules have no diffusers configuration, and their weights are fused, split over GPUs or quantised. The
checkpoint that they were loaded from is the same one, so a plan is held against that.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from sdfp_vllm.dipgo.fingerprint import PipelineFingerprint, fingerprint_of, probed
from sdfp_vllm.dipgo.layout import NAMES, denoisers_of
from sdfp_vllm.errors import SdfpError

_WHOLE = 'Give a checkpoint in diffusers\' format, or load it with diffusion_load_format="diffusers".'


def folder_of(model: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `model` itself, or where it lies in the hub's cache.

    Raises:
        SdfpError: If it is in neither.
    """
    if Path(model).is_dir():
        return Path(model)
    patterns = [f"{name}{suffix}/*" for name in NAMES for suffix in ("", "_2")]
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
    except (OSError, ValueError) as e:
        raise SdfpError(f"model {model}", "is no folder and not in the hub's cache", _WHOLE) from e


def described(folder: Path) -> dict[str, nn.Module]:
    """Diffusers' denoisers of the checkpoint, by name, in the order in which they run; on the meta device.

    Raises:
        SdfpError: If there are none, or diffusers has no such class.
    """
    modules: dict[str, nn.Module] = {}
    for name in (each for base in NAMES for each in (base, f"{base}_2")):
        path = folder / name / "config.json"
        if not path.is_file():
            continue
        config = json.loads(path.read_text())
        kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if kind is None:
            raise SdfpError(
                str(path), f"is of class {config.get('_class_name')}, which diffusers has not", _WHOLE
            )
        with torch.device("meta"):
            modules[name] = kind.from_config(config)
    return denoisers_of(SimpleNamespace(**modules))


def checkpoint_fingerprint(folder: Path, modules: dict[str, nn.Module]) -> PipelineFingerprint:
    """The fingerprint of `described(folder)`, with single weights read from the files.

    Raises:
        SdfpError: If a weight is in no safetensors file.
    """
    return fingerprint_of(
        list(modules.values()), [_probes(folder / name, module) for name, module in modules.items()]
    )


def _probes(folder: Path, denoiser: nn.Module) -> list[float]:
    where: dict[str, Path] = {}
    # The shortest name first: the plain weights before variants of them (.fp16, .non_ema).
    for path in sorted(folder.glob("*.safetensors"), key=lambda p: (p.name.count("."), p.name)):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                where.setdefault(name, path)
    values = []
    for name, parameter in probed(denoiser):
        if name not in where:
            raise SdfpError(str(folder), f"has no safetensors file with {name}", _WHOLE)
        place = np.unravel_index(parameter.numel() // 2, tuple(parameter.shape))
        with safe_open(where[name], framework="pt") as tensors:
            value = tensors.get_slice(name)[tuple(slice(i, i + 1) for i in map(int, place))]
        values.append(float(value))
    return values

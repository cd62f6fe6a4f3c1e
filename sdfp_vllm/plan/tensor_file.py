"""Tensors as a plan keeps them: a safetensors file beside plan.json, described and pinned by the plan.

A safetensors file holds numbers only. Its name is fixed and its hash is in the plan, so that a plan can
neither point elsewhere nor be served with another plan's tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from sdfp_vllm.errors import PlanError

MAX_FILE_BYTES = 1 << 30  # a bridge of rank 64 over each of a hundred layers is a tenth of it


def pack_tensors(tensors: dict[str, Tensor]) -> tuple[bytes, str]:
    """The content of a file with these tensors, and its SHA-256 in hexadecimal."""
    content = safetensors.torch.save(tensors)
    return content, hashlib.sha256(content).hexdigest()


def read_pinned(path: Path, sha256: str, whose: str) -> bytes:
    """Reads a file that the plan beside it pins by its hash.

    Args:
        whose: What in the plan it belongs to, for the message about a missing file.

    Raises:
        PlanError: If the file is missing or is not the one the plan was written with.
    """
    content = _read(path, MAX_FILE_BYTES, whose)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path, "is not the file that the plan was written with (its SHA-256 differs)")
    return content


def unpack_tensors(
    content: bytes, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, path: Path
) -> dict[str, Tensor]:
    """Exactly the tensors in `shapes`, by name; on the CPU.

    Args:
        path: Where the content was read, for the messages.

    Raises:
        PlanError: If the content is anything but the tensors described: by name, shape, dtype, and all finite.
    """
    try:
        found = safetensors.torch.load(content)
    except Exception as e:  # a hostile header raises whatever the parser meets
        raise damaged(path, f"is not a safetensors file ({type(e).__name__}: {e})") from e
    if set(found) != set(shapes):
        odd = sorted(set(found) ^ set(shapes))[0]
        raise damaged(path, f"{'lacks' if odd in shapes else 'holds an unknown'} tensor {odd!r}")
    name_of = str(dtype).removeprefix("torch.")
    for name, shape in shapes.items():
        tensor = found[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise damaged(path, f"tensor {name!r} is {got}, not {name_of} of {shape}")
        if not torch.isfinite(tensor).all():
            raise damaged(path, f"tensor {name!r} holds numbers that are not finite")
    return found


def damaged(path: Path, what: str) -> PlanError:
    """The error for a file that is not what its plan describes."""
    return PlanError(
        str(path), what, "Copy the plan's whole folder, or make it again with `sdfp plan MODEL`."
    )


def _read(path: Path, most: int, whose: str) -> bytes:
    try:
        if path.stat().st_size > most:
            raise damaged(path, f"is larger than the {most} bytes its tensors can take")
        return path.read_bytes()
    except FileNotFoundError as e:
        raise damaged(path, f"is missing, and the plan beside it has {whose}") from e
    except OSError as e:
        raise damaged(path, f"cannot be read ({e})") from e

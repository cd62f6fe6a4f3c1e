"""Bridges as they are stored: `bridges.safetensors` beside plan.json, described and pinned by the plan.

A safetensors file holds numbers only. Its name is fixed and its hash is in the plan, so that a plan can
neither point elsewhere nor be served with another plan's tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch

from sdfp_vllm.bridge import Bridge
from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan import BRIDGE_FILE, BridgeRun, Bridges, SkipPlan, load_plan

Run = tuple[int, int]  # first and last skipped layer

_SHAPES = {"shift": "H", "scale": "H", "mean": "H", "down": "RH", "up": "RH"}
_TENSORS = {
    "bias": ("shift",),
    "affine": ("shift", "scale"),
    "low-rank": ("shift", "mean", "down", "up"),
}
_HEADER_ROOM = 1 << 20


def pack_bridges(runs: Sequence[BridgeRun], bridges: Mapping[Run, Bridge]) -> tuple[Bridges, bytes]:
    """Returns the plan's description of bridges of one kind, and the content of their file (float32)."""
    first = bridges[runs[0].first, runs[0].last]
    tensors = {
        _key((run.first, run.last), name): tensor.detach().cpu().float().contiguous()
        for run in runs
        for name, tensor in bridges[run.first, run.last].tensors().items()
    }
    content = safetensors.torch.save(tensors)
    description = Bridges(
        kind=first.kind, rank=first.rank, runs=list(runs), sha256=hashlib.sha256(content).hexdigest()
    )
    return description, content


def load_bridges(folder: Path, plan: SkipPlan) -> dict[Run, Bridge]:
    """Reads and checks the bridges that `plan`, read from `folder`, describes; float32 on the CPU.

    Raises:
        PlanError: If the file is missing, is not the one the plan was written with, or holds anything
            but the tensors described: by name, shape, dtype, and all finite.
    """
    if plan.bridges == "none":
        return {}
    path = folder / BRIDGE_FILE
    wanted = _wanted(plan.bridges, plan.fingerprint.hidden_size)
    content = _read(path, sum(_size(shape) for shape in wanted.values()) + _HEADER_ROOM)
    if hashlib.sha256(content).hexdigest() != plan.bridges.sha256:
        raise _error(path, "is not the file that the plan was written with (its SHA-256 differs)")
    try:
        found = safetensors.torch.load(content)
    except Exception as e:  # a hostile header raises whatever the parser meets
        raise _error(path, f"is not a safetensors file ({type(e).__name__}: {e})") from e
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))[0]
        raise _error(path, f"{'lacks' if odd in wanted else 'holds an unknown'} tensor {odd!r}")
    for name, shape in wanted.items():
        tensor = found[name]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise _error(
                path,
                f"tensor {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not float32 of {shape}",
            )
        if not torch.isfinite(tensor).all():
            raise _error(path, f"tensor {name!r} holds numbers that are not finite")
    return {
        (r.first, r.last): Bridge(
            **{name: found[_key((r.first, r.last), name)] for name in _TENSORS[plan.bridges.kind]}
        )
        for r in plan.bridges.runs
    }


def bridges_at(path: str | Path, sha256: str) -> dict[Run, Bridge]:
    """The bridges of the plan at `path`, which a worker reads for itself; none where `sha256` is empty.

    Raises:
        PlanError: If the plan or its tensors are no longer those with this hash.
    """
    if not sha256:
        return {}
    path = Path(path)
    plan = load_plan(path)
    folder = path if path.is_dir() else path.parent
    if plan.bridges == "none" or plan.bridges.sha256 != sha256:
        raise PlanError(str(path), "was replaced while the engine started", "Start the engine again.")
    return load_bridges(folder, plan)


def _wanted(bridges: Bridges, hidden: int) -> dict[str, tuple[int, ...]]:
    sizes = {"H": hidden, "R": bridges.rank}
    return {
        _key((run.first, run.last), name): tuple(sizes[letter] for letter in _SHAPES[name])
        for run in bridges.runs
        for name in _TENSORS[bridges.kind]
    }


def _key(run: Run, name: str) -> str:
    return f"{run[0]}-{run[1]}.{name}"


def _size(shape: tuple[int, ...]) -> int:
    size = 4
    for n in shape:
        size *= n
    return size


def _read(path: Path, most: int) -> bytes:
    try:
        if path.stat().st_size > most:
            raise _error(path, f"is larger than the {most} bytes its tensors can take")
        return path.read_bytes()
    except FileNotFoundError as e:
        raise _error(path, "is missing, and the plan beside it has bridges") from e
    except OSError as e:
        raise _error(path, f"cannot be read ({e})") from e


def _error(path: Path, what: str) -> PlanError:
    return PlanError(
        str(path), what, "Copy the plan's whole folder, or make it again with `sdfp plan MODEL`."
    )

"""Bridges as they are stored: `bridges.safetensors` beside plan.json, described and pinned by the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sdfp_vllm.bridge import Bridge
from sdfp_vllm.errors import PlanError
from sdfp_vllm.plan import BRIDGE_FILE, BridgeRun, Bridges, SkipPlan, load_plan
from sdfp_vllm.tensor_file import pack_tensors, read_tensors

Run = tuple[int, int]  # first and last skipped layer

_SHAPES = {"shift": "H", "scale": "H", "mean": "H", "down": "RH", "up": "RH"}
_TENSORS = {
    "bias": ("shift",),
    "affine": ("shift", "scale"),
    "low-rank": ("shift", "mean", "down", "up"),
}


def pack_bridges(runs: Sequence[BridgeRun], bridges: Mapping[Run, Bridge]) -> tuple[Bridges, bytes]:
    """Returns the plan's description of bridges of one kind, and the content of their file (float32)."""
    first = bridges[runs[0].first, runs[0].last]
    tensors = {
        _key((run.first, run.last), name): tensor.detach().cpu().float().contiguous()
        for run in runs
        for name, tensor in bridges[run.first, run.last].tensors().items()
    }
    content, sha256 = pack_tensors(tensors)
    return Bridges(kind=first.kind, rank=first.rank, runs=list(runs), sha256=sha256), content


def load_bridges(folder: Path, plan: SkipPlan) -> dict[Run, Bridge]:
    """Reads and checks the bridges that `plan`, read from `folder`, describes; float32 on the CPU.

    Raises:
        PlanError: If the file is missing, is not the one the plan was written with, or holds anything
            but the tensors described: by name, shape, dtype, and all finite.
    """
    if plan.bridges == "none":
        return {}
    shapes = _shapes(plan.bridges, plan.fingerprint.hidden_size)
    found = read_tensors(folder / BRIDGE_FILE, shapes, torch.float32, plan.bridges.sha256, "bridges")
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


def _shapes(bridges: Bridges, hidden: int) -> dict[str, tuple[int, ...]]:
    sizes = {"H": hidden, "R": bridges.rank}
    return {
        _key((run.first, run.last), name): tuple(sizes[letter] for letter in _SHAPES[name])
        for run in bridges.runs
        for name in _TENSORS[bridges.kind]
    }


def _key(run: Run, name: str) -> str:
    return f"{run[0]}-{run[1]}.{name}"

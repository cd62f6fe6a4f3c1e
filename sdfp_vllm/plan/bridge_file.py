"""Bridges as they are stored: `bridges.safetensors` beside plan.json, described and pinned by the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.schema import BridgeRun, Bridges, SkipPlan
from sdfp_vllm.plan.tensor_file import pack_tensors, unpack_tensors

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


def unpack_bridges(plan: SkipPlan, content: bytes, path: Path) -> dict[Run, Bridge]:
    """The bridges that `plan` describes, from their file's content; float32 on the CPU.

    Raises:
        PlanError: If it holds anything but the tensors described: by name, shape, dtype, and all finite.
    """
    bridges = plan.view.bridges
    assert bridges is not None
    found = unpack_tensors(content, _shapes(bridges, plan.fingerprint.hidden_size), torch.float32, path)
    return {
        (r.first, r.last): Bridge(
            **{name: found[_key((r.first, r.last), name)] for name in _TENSORS[bridges.kind]}
        )
        for r in bridges.runs
    }


def _shapes(bridges: Bridges, hidden: int) -> dict[str, tuple[int, ...]]:
    sizes = {"H": hidden, "R": bridges.rank}
    return {
        _key((run.first, run.last), name): tuple(sizes[letter] for letter in _SHAPES[name])
        for run in bridges.runs
        for name in _TENSORS[bridges.kind]
    }


def _key(run: Run, name: str) -> str:
    return f"{run[0]}-{run[1]}.{name}"

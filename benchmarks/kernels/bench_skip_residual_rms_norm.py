"""skip_residual_rms_norm against vLLM's norm, unfused torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.measure import Case, importable
from sdfp_vllm.kernels.skip_residual_rms_norm import reference, skip_residual_rms_norm
from sdfp_vllm.plan.bridge import Bridge

ROWS, HIDDEN, EPS = (1, 8, 32, 128), (2048, 4096, 5120), 1e-5
KINDS = ("none", "bias", "affine", "low-rank 16", "low-rank 64")
DTYPE = torch.bfloat16


def make_bridge(kind: str, hidden: int) -> Bridge | None:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device="cuda") * 0.01

    if kind == "none":
        return None
    if kind == "bias":
        return Bridge(noise(hidden))
    if kind == "affine":
        return Bridge(noise(hidden), scale=noise(hidden))
    rank = int(kind.split()[1])
    return Bridge(noise(hidden), mean=noise(hidden), down=noise(rank, hidden), up=noise(rank, hidden))


def moved(rows: int, hidden: int, kind: str) -> int:
    """Branch and residual read, residual and output written; weight and bridge read once."""
    vectors = {"none": 0, "bias": 1, "affine": 2}.get(kind)
    if vectors is None:
        vectors = 2 + 2 * int(kind.split()[1])
    return DTYPE.itemsize * hidden * (4 * rows + 1 + vectors)


def cases() -> list[Case]:
    return [
        Case(
            "skip_residual_rms_norm",
            f"{rows} x {hidden}, {kind}",
            "bfloat16",
            moved(rows, hidden, kind),
            providers(rows, hidden, kind),
        )
        for hidden in HIDDEN
        for rows in ROWS
        for kind in KINDS
    ]


def providers(rows: int, hidden: int, kind: str) -> dict[str, Callable[[], Callable[[], object]]]:
    def tensors() -> tuple[Any, ...]:
        branch, residual = (torch.randn(rows, hidden, dtype=DTYPE, device="cuda") for _ in range(2))
        return branch, residual, torch.ones(hidden, dtype=DTYPE, device="cuda")

    def with_op(op: Callable[..., object]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            branch, residual, weight = tensors()
            bridge = make_bridge(kind, hidden)
            return lambda: op(branch, residual, weight, EPS, bridge)

        return make

    def vllm_norm() -> Callable[[], object]:
        from vllm import _custom_ops as ops

        branch, residual, weight = tensors()
        return lambda: ops.fused_add_rms_norm(branch, residual, weight, EPS)

    found = {
        "sdfp": with_op(skip_residual_rms_norm),
        "torch": with_op(reference),
        "torch.compile": with_op(torch.compile(reference, dynamic=False)),
    }
    if kind == "none" and importable("vllm._C"):
        found["vllm fused_add_rms_norm"] = vllm_norm
    return found

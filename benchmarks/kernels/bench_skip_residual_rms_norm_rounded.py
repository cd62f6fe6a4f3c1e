"""skip_residual_rms_norm_rounded against the norm and vLLM's rounding apart, unfused torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.bench_skip_residual_rms_norm import DTYPE, EPS, HIDDEN, ROWS, make_bridge
from benchmarks.kernels.measure import Case, importable
from sdfp_vllm.kernels.skip_residual_rms_norm import skip_residual_rms_norm
from sdfp_vllm.kernels.skip_residual_rms_norm_rounded import (
    DTYPES,
    Precision,
    reference,
    skip_residual_rms_norm_rounded,
)

KINDS = ("none", "affine", "low-rank 16")
PRECISIONS: tuple[Precision, ...] = ("int8", "fp8")


def moved(rows: int, hidden: int, kind: str) -> int:
    """Branch and residual read, residual, rounded rows and scales written; weight and bridge read once."""
    vectors = {"none": 0, "affine": 2}.get(kind)
    if vectors is None:
        vectors = 2 + 2 * int(kind.split()[1])
    return DTYPE.itemsize * hidden * (3 * rows + 1 + vectors) + rows * (hidden + 4)


def cases() -> list[Case]:
    return [
        Case(
            "skip_residual_rms_norm_rounded",
            f"{rows} x {hidden}, {kind}, {precision}",
            "bfloat16",
            moved(rows, hidden, kind),
            providers(rows, hidden, kind, precision),
        )
        for hidden in HIDDEN
        for rows in ROWS
        for kind in KINDS
        for precision in PRECISIONS
    ]


def providers(
    rows: int, hidden: int, kind: str, precision: Precision
) -> dict[str, Callable[[], Callable[[], object]]]:
    def tensors() -> tuple[Any, ...]:
        branch, residual = (torch.randn(rows, hidden, dtype=DTYPE, device="cuda") for _ in range(2))
        return branch, residual, torch.ones(hidden, dtype=DTYPE, device="cuda")

    def with_op(op: Callable[..., object]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            branch, residual, weight = tensors()
            bridge = make_bridge(kind, hidden)
            return lambda: op(branch, residual, weight, EPS, bridge, precision=precision)

        return make

    def norm_then_vllm() -> Callable[[], object]:
        branch, residual, weight = tensors()
        bridge, quantise = make_bridge(kind, hidden), vllm_quant(precision)
        return lambda: quantise(skip_residual_rms_norm(branch, residual, weight, EPS, bridge))

    def vllm_fused() -> Callable[[], object]:
        from vllm import _custom_ops as ops

        branch, residual, weight = tensors()
        dtype = DTYPES[precision]
        return lambda: ops.rms_norm_dynamic_per_token_quant(branch, weight, EPS, dtype, residual=residual)

    found = {
        "sdfp": with_op(skip_residual_rms_norm_rounded),
        "torch": with_op(reference),
        "torch.compile": with_op(torch.compile(reference, dynamic=False)),
    }
    if importable("vllm._C"):
        found["sdfp norm, then vllm quant"] = norm_then_vllm
        if kind == "none":
            found["vllm rms_norm_dynamic_per_token_quant"] = vllm_fused
    return found


def vllm_quant(precision: Precision) -> Callable[[torch.Tensor], object]:
    """vLLM's rounding with a scale per token, a launch of its own."""
    from vllm import _custom_ops as ops

    if precision == "int8":
        return ops.scaled_int8_quant
    return lambda rows: ops.scaled_fp8_quant(rows, use_per_token_if_dynamic=True)

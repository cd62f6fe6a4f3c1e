"""embed_rms_norm against an embedding and vLLM's norm, unfused torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels.measure import Case, importable
from sdfp_vllm.kernels.embed_rms_norm import embed_rms_norm, reference

ROWS, HIDDEN, VOCAB, EPS = (1, 8, 32, 128), (2048, 4096, 5120), 32_000, 1e-5
DTYPE = torch.bfloat16


def moved(rows: int, hidden: int) -> int:
    """Ids and embedding rows read, residual and output written; weight read once."""
    return rows * 4 + DTYPE.itemsize * hidden * (3 * rows + 1)


def cases() -> list[Case]:
    return [
        Case("embed_rms_norm", f"{rows} x {hidden}", "bfloat16", moved(rows, hidden), providers(rows, hidden))
        for hidden in HIDDEN
        for rows in ROWS
    ]


def providers(rows: int, hidden: int) -> dict[str, Callable[[], Callable[[], object]]]:
    def tensors() -> tuple[Any, ...]:
        ids = torch.randint(0, VOCAB, (rows,), dtype=torch.int32, device="cuda")
        table = torch.randn(VOCAB, hidden, dtype=DTYPE, device="cuda")
        return ids, table, torch.ones(hidden, dtype=DTYPE, device="cuda")

    def with_op(op: Callable[..., object]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            ids, table, weight = tensors()
            return lambda: op(ids, table, weight, EPS)

        return make

    def vllm_norm() -> Callable[[], object]:
        from vllm import _custom_ops as ops

        ids, table, weight = tensors()
        out = torch.empty(rows, hidden, dtype=DTYPE, device="cuda")
        return lambda: ops.rms_norm(out, F.embedding(ids, table), weight, EPS)

    found = {
        "sdfp": with_op(embed_rms_norm),
        "torch": with_op(reference),
        "torch.compile": with_op(torch.compile(reference, dynamic=False)),
    }
    if importable("vllm._C"):
        found["embedding + vllm rms_norm"] = vllm_norm
    return found

"""draft_step against torch, and against what vLLM 0.32's V2 runner launches for the same (sampling alone)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.measure import Case, importable
from sdfp_vllm.kernels.draft_step import DraftWorkspace, KvSlots, draft_step

ROWS, VOCABS, STATES, DRAFTS, LIMIT = (1, 8, 32, 128), (32_000, 151_936), 256, 8, 4096
DTYPE = torch.bfloat16


def moved(rows: int, vocab: int, sampled: bool) -> int:
    """Logits read and, where they are kept for verification, written; the rest is tens of bytes a row."""
    return rows * vocab * DTYPE.itemsize * (2 if sampled else 1)


def cases() -> list[Case]:
    return [
        Case(
            "draft_step",
            f"{rows} x {vocab}, {'sampled' if sampled else 'greedy'}",
            "bfloat16",
            moved(rows, vocab, sampled),
            providers(rows, vocab, sampled),
        )
        for vocab in VOCABS
        for rows in ROWS
        for sampled in (False, True)
    ]


def step_inputs(rows: int, vocab: int, sampled: bool) -> dict[str, Any]:
    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    return dict(
        logits=torch.randn(rows, vocab, dtype=DTYPE, device="cuda"),
        idx_mapping=torch.arange(rows, dtype=torch.int32, device="cuda"),
        temperature=torch.ones(STATES, device="cuda") if sampled else None,
        seeds=zeros(STATES, dtype=torch.int64) if sampled else None,
        step=zeros(dtype=torch.int64),
        positions=zeros(rows, dtype=torch.int64),
        seq_lens=zeros(rows, dtype=torch.int32),
        input_ids=zeros(rows, dtype=torch.int32),
        draft_tokens=zeros(rows, DRAFTS, dtype=torch.int64),
        slots=KvSlots(
            (zeros(STATES, LIMIT // 16, dtype=torch.int32),), (16,), zeros(1, rows, dtype=torch.int64)
        ),
        max_model_len=LIMIT,
        logits_cache=zeros(STATES, DRAFTS, vocab, dtype=DTYPE) if sampled else None,
    )


def providers(rows: int, vocab: int, sampled: bool) -> dict[str, Callable[[], Callable[[], object]]]:
    def ours() -> Callable[[], object]:
        inputs = step_inputs(rows, vocab, sampled)
        workspace = DraftWorkspace(rows, vocab, "cuda")
        return lambda: draft_step(**inputs, workspace=workspace)

    def argmax() -> Callable[[], object]:
        logits = step_inputs(rows, vocab, sampled)["logits"]
        return lambda: logits.argmax(-1)

    def vllm_sample() -> Callable[[], object]:
        from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

        s = step_inputs(rows, vocab, sampled)
        return lambda: gumbel_sample(
            s["logits"], s["idx_mapping"], s["temperature"], s["seeds"], s["positions"], True, True,
            logits_cache=s["logits_cache"], logits_cache_col=s["step"],
        )  # fmt: skip

    found: dict[str, Callable[[], Callable[[], object]]] = {"sdfp": ours}
    if not sampled:
        found["torch argmax (the choice alone)"] = argmax
    elif importable("vllm.v1.worker.gpu.sample.gumbel"):
        found["vllm gumbel_sample (the choice alone)"] = vllm_sample
    return found

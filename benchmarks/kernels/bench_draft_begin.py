"""draft_begin against the same in torch. It moves next to nothing: what counts is launches, so time, not share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.measure import Case
from sdfp_vllm.kernels.draft_begin import draft_begin, reference
from sdfp_vllm.kernels.draft_step import KvSlots

ROWS, STATES, LIMIT, DRAFTS = (1, 8, 32, 128), 256, 4096, 4
_BYTES_PER_ROW = 4 + 4 + 4 + 8 + 4 + 8 + 4 + 4  # read: ids, counts, token, start, position, length, block
_BYTES_PER_SEAT = 8 + 4 + 8 + 4 + 8 + 4  # written: draft_idx, token, position, length, slot, start


def cases() -> list[Case]:
    return [
        Case(
            "draft_begin",
            f"{rows} of {STATES}",
            "-",
            rows * _BYTES_PER_ROW + STATES * _BYTES_PER_SEAT,
            {
                "sdfp": lambda rows=rows: _call(draft_begin, rows),
                "torch": lambda rows=rows: _call(reference, rows),
            },
        )
        for rows in ROWS
    ]


def _call(op: Callable[..., None], rows: int) -> Callable[[], object]:
    inputs = round_inputs(rows)
    return lambda: op(**inputs)


def round_inputs(rows: int) -> dict[str, Any]:
    """A verification of `DRAFTS` tokens for each of `rows` requests, all accepted."""
    width = DRAFTS + 1

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    return dict(
        idx_mapping=torch.arange(rows, dtype=torch.int32, device="cuda"),
        num_sampled=torch.full((rows,), width, dtype=torch.int32, device="cuda"),
        num_rejected=zeros(rows, dtype=torch.int32),
        last_sampled=zeros(STATES, dtype=torch.int64),
        query_start_loc=torch.arange(0, (rows + 1) * width, width, dtype=torch.int32, device="cuda"),
        target_positions=torch.arange(width, device="cuda").repeat(rows),
        target_seq_lens=torch.full((rows,), width, dtype=torch.int32, device="cuda"),
        draft_idx=zeros(STATES, dtype=torch.int64),
        input_ids=zeros(STATES, dtype=torch.int32),
        positions=zeros(STATES, dtype=torch.int64),
        seq_lens=zeros(STATES, dtype=torch.int32),
        draft_query_start_loc=zeros(STATES + 1, dtype=torch.int32),
        slots=KvSlots(
            (zeros(STATES, LIMIT // 16, dtype=torch.int32),), (16,), zeros(1, STATES, dtype=torch.int64)
        ),
        max_model_len=LIMIT,
    )

"""Rotary positions of draft steps, where a model has several for each token (M-RoPE).

A token of an image has a position in time, height and width; a text token has one number in all rows. A prompt's images
take up fewer positions than tokens, so a generated token's number is its place in the sequence plus a delta, one for each
request, which vLLM computes from the prompt. Where a token's K/V goes is still decided by its place in the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class RotaryPositions:
    """What the draft's layers are given as positions, beside the places in the sequence that slots are computed from.

    Args:
        rows: int64 [dims, width], at a fixed place in memory: compiled and captured graphs read it there.
    """

    def __init__(self, rows: torch.Tensor):
        self._rows = rows
        self._deltas = rows.new_zeros(rows.shape[1])
        self._known: list[int] = []

    def begin(self, requests: Mapping[str, Any], names: Sequence[str]) -> None:
        """Takes the deltas of the batch's requests, in the batch's order."""
        deltas = [requests[name].mrope_position_delta or 0 for name in names]
        if deltas == self._known:  # as in most rounds
            return
        self._known = deltas
        # From pinned memory: from any other a copy would wait for all that the device has been given to do.
        host = torch.tensor(deltas, dtype=torch.int64, pin_memory=self._deltas.is_cuda)
        self._deltas[: len(deltas)].copy_(host, non_blocking=True)

    def follow(self, places: torch.Tensor) -> None:
        """Moves every request to its place in the sequence, int64 [batch]."""
        # Past the maximum length vLLM sets a place of 0, from which a delta would lead out of the rotary table.
        self._rows[:, : len(places)] = (places + self._deltas[: len(places)]).clamp_min(0)

    def first(self, count: int) -> torch.Tensor:
        """A view of the first `count` tokens' positions, int64 [dims, count]."""
        return self._rows[:, :count]

"""Rotary positions of draft steps in the V2 runner, where a model has several for each token (M-RoPE).

As in `engine/v1/positions.py`: in all rows a generated token's number is its place in the sequence plus its request's
delta, which vLLM keeps in the target's `RopeState` by request state. Deltas are gathered once a round, before any graph
runs, since vLLM's own buffer of them moves; what a step does lies in buffers that stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch


class RotaryPositions:
    """What the draft's layers are given as positions.

    Args:
        dims: Rows of positions.
        width: Most tokens of a draft step, padding included.
    """

    def __init__(self, dims: int, width: int, device: torch.device):
        # One column more than is used: as upstream's, not contiguous, so that compiled graphs take any width.
        self._rows = torch.zeros(dims, width + 1, dtype=torch.int64, device=device)
        self._deltas = torch.zeros(width, dtype=torch.int64, device=device)

    def begin(self, rope_state: Any, idx_mapping: torch.Tensor) -> None:
        """Takes the deltas of the batch's requests.

        Args:
            rope_state: vLLM's, with `prefill_delta.gpu`, int32 [max requests].
            idx_mapping: int [requests], their states; below 0 where a row is no one's.
        """
        deltas = rope_state.prefill_delta.gpu[idx_mapping.clamp_min(0).long()]
        self._deltas[: len(idx_mapping)].copy_(deltas)

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """Rows for tokens at `places` of their sequences, int64 [tokens]: int64 [dims, tokens], a view of a fixed buffer."""
        rows = self._rows[:, : len(places)]
        # Padding may stand at 0, from which a delta would lead out of the rotary table.
        rows.copy_((places + self._deltas[: len(places)]).clamp_min(0).expand(len(rows), -1))
        return rows

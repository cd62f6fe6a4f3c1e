"""Bridge: a small closed-form map that stands in for a run of skipped layers.

A dropped layer is the identity on the residual stream; a bridge is the next cheapest thing. It is
fitted offline (`planner/bridges.py`), stored beside the plan (`bridge_file.py`) and applied on entry
into the next kept layer (`kernels/skip_residual_rms_norm.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

BridgeKind = Literal["bias", "affine", "low-rank"]


@dataclass(frozen=True, eq=False)
class Bridge:
    """Map of the residual stream h [..., H] over one run of skipped layers:

        bias       h + shift
        affine     scale * h + shift
        low-rank   h + up^T down (h - mean) + shift

    Attributes:
        shift: [H].
        scale: [H], affine only.
        mean: [H]; down, up: [R, H] with R at most MAX_BRIDGE_RANK; low-rank only. `up` is stored by rank, so that a
            kernel reads both matrices along their rows.
    """

    shift: Tensor
    scale: Tensor | None = None
    mean: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None

    @property
    def kind(self) -> BridgeKind:
        if self.down is not None:
            return "low-rank"
        return "bias" if self.scale is None else "affine"

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.shift.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors this kind has, by attribute name."""
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Bridge:
        return replace(self, **{k: t.to(device=device, dtype=dtype) for k, t in self.tensors().items()})

    def apply(self, h: Tensor) -> Tensor:
        """h [..., H] -> the same shape and dtype; computed in float32 or wider."""
        wide = torch.promote_types(h.dtype, torch.float32)
        x, t = h.to(wide), {k: v.to(wide) for k, v in self.tensors().items()}
        if "down" in t:
            y = x + (x - t["mean"]) @ t["down"].T @ t["up"] + t["shift"]
        elif "scale" in t:
            y = t["scale"] * x + t["shift"]
        else:
            y = x + t["shift"]
        return y.to(h.dtype)

"""Multiply-accumulate operations of a denoiser, unit by unit, counted without computing anything."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from sdfp_vllm.dipgo.cost import Cost
from sdfp_vllm.dipgo.layout import Gates, Layout


class MacCount(Cost):
    """MACs of one denoiser call for one batch row. A call costs `rest` always, `units[i]` if unit i runs.

    `rows_per_image` is 2 with classifier-free guidance (condition and null condition in one batch).
    """

    units: list[int] = Field(min_length=1)
    rest: int = Field(ge=0)
    rows_per_image: int = Field(default=1, ge=1)

    def per_image(self, executed: Gates) -> int:
        """MACs to denoise one image when the units in `executed` (calls, units) run."""
        calls = len(executed)
        return self.rows_per_image * (calls * self.rest + int(executed.sum(0) @ np.array(self.units)))

    def share(self, executed: Gates) -> float:
        return self.per_image(executed) / self.per_image(np.ones_like(executed))


def count_macs(
    denoiser: nn.Module, layout: Layout, args: tuple, kwargs: dict[str, Any], attention: bool = True
) -> MacCount:
    """Counts the call `denoiser(*args, **kwargs)` on the meta device: matrix products, convolutions, attention.

    A multiplication with its addition is one MAC (half of what torch's FlopCounterMode reports).
    Normalisations and pointwise work are not counted, as in the papers.

    Args:
        args, kwargs: Of a real call that denoises one image; tensors' values are not read. The
            batch, the first dimension of the first argument, is the rows per image.
        attention: False leaves out attention's own products (queries with keys, weights with
            values), as DeepCache's and DiP-GO's figures for Stable Diffusion do; their figures for
            DiT have them.
    """
    with torch.device("meta"):
        twin = type(denoiser).from_config(denoiser.config)  # type: ignore[attr-defined]
    twin = twin.to("meta").eval()
    args, kwargs = tree_map(_shadow, (args, kwargs))
    rows = (args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]).shape[0]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        twin(*args, **kwargs)
    root = type(twin).__name__
    flops = {
        name: sum(n for op, n in ops.items() if attention or not _is_attention(op))
        for name, ops in counter.get_flop_counts().items()
    }
    total = flops["Global"] // 2 // rows
    units = [flops.get(f"{root}.{u.name}" if u.name else root, 0) // 2 // rows for u in layout.units]
    return MacCount(units=units, rest=total - sum(units), rows_per_image=rows)


def _is_attention(op: Any) -> bool:
    return op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm) or "scaled_dot_product" in str(op)


def _shadow(value: Any) -> Any:
    """A tensor's shape on the meta device, in the dtype the twin has."""
    if not isinstance(value, Tensor):
        return value
    return value.to("meta", torch.float32) if value.is_floating_point() else value.to("meta")

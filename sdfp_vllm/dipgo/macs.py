"""Multiply-accumulate operations of a denoiser, unit by unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from sdfp_vllm.dipgo.cost import Cost
from sdfp_vllm.dipgo.layout import Gates, Layout
from sdfp_vllm.dipgo.streams import batch_of


class MacCount(Cost):
    """MACs of one step for one batch row. A step costs `rest` always, `units[i]` if unit i runs.

    `rows_per_image` is 2 with classifier-free guidance in one batch (condition and null condition). With guidance
    in calls of its own it is 1, and the figures are sums over the calls of a step.
    """

    units: list[int] = Field(min_length=1)
    rest: int = Field(ge=0)
    rows_per_image: int = Field(default=1, ge=1)

    def per_image(self, executed: Gates) -> int:
        """MACs to denoise one image when the units in `executed` (steps, units) run."""
        calls = len(executed)
        return self.rows_per_image * (calls * self.rest + int(executed.sum(0) @ np.array(self.units)))

    def share(self, executed: Gates) -> float:
        return self.per_image(executed) / self.per_image(np.ones_like(executed))


def count_macs(
    denoiser: nn.Module, layout: Layout, args: tuple, kwargs: dict[str, Any], attention: bool = True
) -> MacCount:
    """Makes the call `denoiser(*args, **kwargs)` and counts it: matrix products, convolutions, attention.

    It is the denoiser itself that is called, so that adapters and replaced attention are counted too; on the meta device
    nothing is computed. A multiplication with its addition is one MAC (half of what torch's FlopCounterMode reports).
    Normalisations and pointwise work are not counted, as in the papers.

    Args:
        args, kwargs: Of a real call that denoises one image. The rows of its batch are those per image.
        attention: False leaves out attention's own products (queries with keys, weights with
            values), as DeepCache's and DiP-GO's figures for Stable Diffusion do; their figures for
            DiT have them.
    """
    # Some denoisers take arguments out of the containers that they are given.
    args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs))
    rows = batch_of(args, kwargs).shape[0]
    # Fused attention on a CPU is an operation that FlopCounterMode does not know.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        denoiser(*args, **kwargs)
    root = type(denoiser).__name__
    flops = {
        name: sum(n for op, n in ops.items() if attention or not _is_attention(op))
        for name, ops in counter.get_flop_counts().items()
    }
    total = flops["Global"] // 2 // rows
    units = [flops.get(f"{root}.{u.name}" if u.name else root, 0) // 2 // rows for u in layout.units]
    if any(unit.guidance for unit in layout.units):  # of the same module: a half of the rows each
        units = [total // 2, total - total // 2]
    return MacCount(units=units, rest=total - sum(units), rows_per_image=rows)


def _is_attention(op: Any) -> bool:
    return op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm) or "scaled_dot_product" in str(op)


def step_macs(counts: Sequence[MacCount]) -> MacCount:
    """The MACs of a step from those of its calls."""
    rows = counts[0].rows_per_image
    units = [
        sum(of) // rows for of in zip(*([u * c.rows_per_image for u in c.units] for c in counts), strict=True)
    ]
    return MacCount(
        units=units, rest=sum(c.rest * c.rows_per_image for c in counts) // rows, rows_per_image=rows
    )

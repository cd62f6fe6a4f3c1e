"""Families of keep sets, one for each size: evenly spaced layers, and branches above a falling threshold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdfp_vllm.fit.cost import MeasuredCost
from sdfp_vllm.fit.search import leading_ends
from sdfp_vllm.keep import KeepSet
from sdfp_vllm.plan import LayerScore


def evenly_spaced(num_layers: int, sizes: Sequence[int]) -> list[KeepSet]:
    """Layers from the first to the last at equal distances, for each of `sizes`; one layer is the first."""
    return [KeepSet.of(round(i * (num_layers - 1) / max(1, size - 1)) for i in range(size)) for size in sizes]


def fit_branches(scores: Sequence[LayerScore], cost: MeasuredCost, form: str) -> Tensor:
    """FIT score of each branch over its time, float64 [L, 2] (attention, MLP); those of end layers lead."""
    values = torch.tensor(
        [[getattr(s.attention, f"{form}_score"), getattr(s.mlp, f"{form}_score")] for s in scores],
        dtype=torch.float64,
    )
    attention = cost.attention[0] / cost.layer[0]
    values /= torch.tensor([attention, 1 - attention], dtype=torch.float64)
    for i in leading_ends(scores, form):
        values[i] += values.max()
    return values


def nested_keep_sets(values: Tensor, cost: MeasuredCost, sizes: list[int]) -> list[KeepSet]:
    """For each of `sizes` (layers' worth of draft time), the branches above the lowest threshold that fits it.

    Args:
        values: float [L, 2] (attention, MLP), the higher the sooner; equal ones come together.

    Returns:
        Keep sets with attention in them, the smallest first, none twice.
    """
    thresholds = values.flatten().unique().sort(descending=True).values
    family: dict[KeepSet, None] = {}
    for size in sizes:
        low, high = 0, len(thresholds)  # keep sets of the first `low` thresholds fit
        while low < high:
            middle = (low + high + 1) // 2
            keep = _above(values, thresholds[middle - 1])
            fits = cost.forward_ms(keep, 1) <= cost.forward_ms(size, 1) * (1 + 1e-9)
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            keep = _above(values, thresholds[low - 1])
            if keep.layers or keep.attention:
                family[keep] = None
    return list(family)


def _above(values: Tensor, threshold: Tensor) -> KeepSet:
    kept = values >= threshold
    return KeepSet.from_branches(*(kept[:, j].nonzero().flatten().tolist() for j in (0, 1)))

"""Families of views: evenly spaced layers, branches above a falling threshold, and a chain of skipping and rounding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import LayerScore
from sdfp_vllm.plan.view import BRANCHES, DraftView, Mode, Precision, Unit
from sdfp_vllm.planner.memory import Memory
from sdfp_vllm.planner.search import leading_ends


def evenly_spaced(num_layers: int, sizes: Sequence[int]) -> list[KeepSet]:
    """Layers from the first to the last at equal distances, for each of `sizes`; one layer is the first."""
    return [KeepSet.of(round(i * (num_layers - 1) / max(1, size - 1)) for i in range(size)) for size in sizes]


def fit_branches(scores: Sequence[LayerScore], cost: Costs, form: str) -> Tensor:
    """FIT score of each branch over its time, float64 [L, 2] (attention, MLP); those of end layers lead."""
    values = torch.tensor(
        [[getattr(s.attention, f"{form}_score"), getattr(s.mlp, f"{form}_score")] for s in scores],
        dtype=torch.float64,
    )
    attention = attention_share(cost)
    values /= torch.tensor([attention, 1 - attention], dtype=torch.float64)
    for i in leading_ends(scores, form):
        values[i] += values.max()
    return values


def attention_share(cost: Costs) -> float:
    """Attention's part of a layer's time at one row, at full precision."""
    attention, mlp = cost.attention["full"][0], cost.mlp["full"][0]
    return attention / (attention + mlp)


def nested_keep_sets(values: Tensor, cost: Costs, sizes: list[int]) -> list[KeepSet]:
    """For each of `sizes` (layers' worth of draft time), the branches above the lowest threshold that fits it.

    Args:
        values: float [L, 2] (attention, MLP), the higher the sooner; equal ones come together.

    Returns:
        Keep sets with attention in them, the smallest first, none twice.
    """
    thresholds = values.flatten().unique().sort(descending=True).values
    family: dict[KeepSet, None] = {}
    layer = cost.layers_ms(KeepSet((0,)), 1)
    for size in sizes:
        low, high = 0, len(thresholds)  # keep sets of the first `low` thresholds fit
        while low < high:
            middle = (low + high + 1) // 2
            keep = _above(values, thresholds[middle - 1])
            fits = cost.layers_ms(keep, 1) <= size * layer * (1 + 1e-9)
            low, high = (middle, high) if fits else (low, middle - 1)
        if low:
            keep = _above(values, thresholds[low - 1])
            if keep.layers or keep.attention:
                family[keep] = None
    return list(family)


def choice_scores(scores: Sequence[LayerScore], form: str) -> dict[tuple[Unit, Mode], float]:
    """FIT's score of each choice for each branch: skipping it, or rounding it to a precision.

    Skipping scores in `form`; rounding by trace x variance (FIT, arXiv 2210.08502, eq. 7 with the perturbation
    q(theta) - theta). Skipping in the first and last layer comes after all else, unless they score far below (`leading_ends`).
    """
    found: dict[tuple[Unit, Mode], float] = {}
    for s in scores:
        for branch in BRANCHES:
            score = getattr(s, branch)
            found[(branch, s.layer), "skip"] = getattr(score, f"{form}_score")
            found.update({((branch, s.layer), p): value for p, value in score.rounding_scores.items()})
    most = max(found.values(), default=0.0)
    for i in leading_ends(scores, form):
        for branch in BRANCHES:
            found[(branch, i), "skip"] += most
    return found


def nested_views(
    scores: Sequence[LayerScore], cost: Costs, precisions: Sequence[Precision], form: str, memory: Memory
) -> list[DraftView]:
    """A chain of views from all at full precision to one attention branch, each cheaper than the one before.

    Of each branch's choices those on the lower convex hull of (time, score) are steps; the steps of all branches
    are taken in the order of score per millisecond saved, as in the greedy solution of a multiple-choice knapsack.
    A step whose rounded copy does not fit into `memory` is left out, and the branch goes on from where it was; so is
    skipping the last attention, for nothing drafts without.
    """
    worth = choice_scores(scores, form)
    times = {"attention": cost.attention, "mlp": cost.mlp}
    overhead = cost.draft_added_ms / 2
    running: dict[Unit, Precision] = {(b, s.layer): "full" for s in scores for b in BRANCHES}
    heap: list[tuple[float, Unit, Mode]] = []

    def points(unit: Unit, without: set[Mode]) -> dict[Mode, tuple[float, float]]:
        found: dict[Mode, tuple[float, float]] = {}
        if "skip" not in without:
            found["skip"] = (0.0, worth[unit, "skip"])
        for p in precisions:
            if p not in without and (p == "full" or (unit, p) in worth):
                found[p] = (times[unit[0]][p][0] + overhead, 0.0 if p == "full" else worth[unit, p])
        return found

    def push(unit: Unit, without: set[Mode]) -> None:
        of = points(unit, without)
        ms, score = of[running[unit]]
        steps = [((s - score) / (ms - m), c) for c, (m, s) in of.items() if m < ms]
        if steps:  # the least slope is the next corner of the hull
            slope, choice = min(steps)
            heapq.heappush(heap, (slope, unit, choice))

    left_out: dict[Unit, set[Mode]] = {unit: set() for unit in running}
    for unit in running:
        push(unit, left_out[unit])
    chain = [DraftView.from_units(running)]
    while heap:
        _, unit, choice = heapq.heappop(heap)
        after = {u: p for u, p in running.items() if u != unit}
        if choice != "skip":
            after[unit] = choice
        view = DraftView.from_units(after)
        if memory.admits(view) and (view.layers or view.attention):
            running = after
            chain.append(view)
        else:
            left_out[unit].add(choice)
        if unit in running:
            push(unit, left_out[unit])
    return chain


def spread(chain: Sequence[DraftView], cost: Costs, most: int) -> list[DraftView]:
    """At most `most` views of a chain, evenly spaced in time, its first left out: that is the target."""
    times = [cost.layers_ms(view, 1) for view in chain]
    wanted = [times[0] * (most - j) / (most + 1) for j in range(most)]
    return list(
        dict.fromkeys(chain[min(range(1, len(chain)), key=lambda i: abs(times[i] - ms))] for ms in wanted)
    )


def _above(values: Tensor, threshold: Tensor) -> KeepSet:
    kept = values >= threshold
    return KeepSet.from_branches(*(kept[:, j].nonzero().flatten().tolist() for j in (0, 1)))

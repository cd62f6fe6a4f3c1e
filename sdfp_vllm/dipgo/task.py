"""What is searched over, and what a search finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfp_vllm.dipgo.cost import Cost, CostName
from sdfp_vllm.dipgo.forecast import Forecasts
from sdfp_vllm.dipgo.layout import Gates, Granularity, Layout
from sdfp_vllm.dipgo.macs import MacCount, count_macs, step_macs
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.stopwatch import measure_latency
from sdfp_vllm.errors import SdfpError


@dataclass(frozen=True)
class Pattern:
    """Which units run, and how those that do not are forecast: (steps, units) each; kinds are not read where a unit runs."""

    gates: Gates
    kinds: Forecasts

    @classmethod
    def of(cls, gates: Gates, kind: str) -> Pattern:
        """Gates with one kind of forecast for all."""
        return cls(gates, np.full(gates.shape, kind))


@dataclass(frozen=True)
class Task:
    """What is searched over: a denoiser's units, how they are reused, and how much of `cost` may be spent."""

    sampler: Sampler
    layout: Layout
    macs: MacCount
    cost: Cost
    reuse: str
    order: int
    budget: float

    @property
    def stages(self) -> tuple[int, ...]:
        """The steps at which a denoiser takes over, in which everything runs."""
        return self.sampler.rhythm.stages

    @cached_property
    def least(self) -> float:
        """The share of the cost that no plan is below: the steps in which everything runs, and what always does."""
        gates = np.zeros((self.sampler.calls, len(self.layout.units)), dtype=bool)
        gates[list(self.stages)] = True
        return self.cost.share(gates)

    @cached_property
    def unit_shares(self) -> NDArray[np.float64]:
        """The share of the full run's cost that one call of each unit is: (units,)."""
        everything = np.ones((self.sampler.calls, len(self.layout.units)), dtype=bool)
        shares = []
        for i in range(everything.shape[1]):
            less = everything.copy()
            less[-1, i] = False
            shares.append(self.cost.share(everything) - self.cost.share(less))
        return np.array(shares)

    def fits(self, gates: Gates) -> bool:
        return self.cost.share(self.layout.closure(gates, self.reuse)) <= self.budget

    def run(self, gates: Gates, seeds: Sequence[int], forecasts: Forecasts | None = None) -> Tensor:
        """Latents of `seeds` with `gates`, units left out for real."""
        gates = self.layout.closure(gates, self.reuse)
        with (
            torch.no_grad(),
            Skipping(
                self.sampler.denoisers,
                self.layout,
                gates,
                self.reuse,
                self.order,
                self.sampler.rhythm,
                forecasts=forecasts,
            ),
        ):
            return self.sampler.latents(seeds)


@dataclass(frozen=True)
class Found:
    """Gates for a way of reuse, the scores they come from if they were learned, and forecasts if each gate has its own."""

    granularity: Granularity
    task: Task
    gates: Gates
    scores: NDArray | None = None
    forecasts: Forecasts | None = None


def macs_of(sampler: Sampler, layout: Layout) -> MacCount:
    """MACs of a step of the pipeline, all of its calls together.

    Raises:
        SdfpError: If its denoisers differ in size.
    """
    counts = [
        step_macs([count_macs(denoiser, layout, *call) for call in calls])
        for denoiser, calls in zip(sampler.denoisers, sampler.first_calls, strict=True)
    ]
    if any(count != counts[0] for count in counts):
        raise SdfpError(
            type(sampler.pipe).__name__,
            f"has denoisers of different sizes ({', '.join(sampler.rhythm.denoisers)})",
            "DiP-GO plans for experts of one size.",
        )
    return counts[0]


def task_of(
    sampler: Sampler,
    granularity: Granularity,
    reuse: str,
    order: int,
    budget: float,
    cost: CostName = "macs",
    latency_images: int = 1,
) -> Task:
    """The task of a way of reuse; `cost` "latency" measures it first.

    Raises:
        SdfpError: If the denoiser does not allow the way, or the budget is less than any plan costs.
    """
    layout = sampler.layout(granularity)
    if reuse == "residual" and not layout.residual:
        raise SdfpError(
            "--reuse residual",
            f"units of {type(sampler.denoiser).__name__} at {granularity} granularity change their input's shape",
            "Use --reuse output.",
        )
    macs = macs_of(sampler, layout)
    counted: Cost = macs
    if cost == "latency":
        counted = measure_latency(sampler, layout, reuse, order, latency_images)
    task = Task(sampler, layout, macs, counted, reuse, order, budget)
    refuse_below(task.least, budget, cost)
    return task


def refuse_below(least: float, budget: float, cost: CostName) -> None:
    """Refuses a budget below the least share of the cost that a plan can have."""
    if budget < least:
        raise SdfpError(
            f"--budget {budget:g}",
            f"is less than the first call and what always runs, {least:.3f} of the {cost}",
            f"Give at least {least + 0.001:.3f}, or more steps.",
        )

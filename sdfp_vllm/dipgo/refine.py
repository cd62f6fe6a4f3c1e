"""Finds gates for a budget with the surrogate, then improves them on real generations of held-out seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sdfp_vllm.dipgo.cost import Cost
from sdfp_vllm.dipgo.forecast import Forecasts
from sdfp_vllm.dipgo.layout import Gates, Layout
from sdfp_vllm.dipgo.macs import MacCount
from sdfp_vllm.dipgo.quality import psnr
from sdfp_vllm.dipgo.runtime import Skipping
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.surrogate import Surrogate, record

MAX_SWAPS = 8
MAX_SLIDING = 15.0  # full generations' worth of MACs


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


def log_errors(latents: Tensor, full: Tensor) -> Tensor:
    """Of each image, log10 of the mean squared error: falls by 0.1 for 1 dB of latent PSNR."""
    error = (latents - full).square().flatten(1).mean(1)
    return torch.log10(error.clamp(min=1e-12))


def log_error(latents: Tensor, full: Tensor) -> float:
    """Mean over images of their log errors."""
    return float(log_errors(latents, full).mean())


def greedy(task: Task, surrogate: Surrogate) -> Gates:
    """Closes gates one by one, each time the one with the least predicted error per cost saved, down to the budget."""
    gates, stages = np.ones((task.sampler.calls, len(task.layout.units)), dtype=bool), task.stages
    while not task.fits(gates):
        share, loss = task.cost.share(gates), surrogate.loss(gates)
        best, best_price = gates, np.inf
        for t, i in _later(gates, stages):
            trial = gates.copy()
            trial[t, i] = False
            trial = task.layout.closure(trial, task.reuse)
            price = (surrogate.loss(trial) - loss) / (share - task.cost.share(trial))
            if price < best_price:
                best, best_price = trial, price
        if best is gates:
            break  # nothing is left to close but the first call
        gates = best
    return gates


def _later(which: Gates, stages: Sequence[int]) -> list[tuple[int, int]]:
    """(step, unit) of every True entry but those of the steps in which a denoiser takes over."""
    return [(int(t), int(i)) for t, i in np.argwhere(which) if t not in stages]


def swaps(gates: Gates, stages: Sequence[int] = (0,)) -> Iterator[Gates]:
    """Every pattern with one closed gate opened and one open gate closed, or only opened; first steps stay."""
    opened = _later(gates, stages)
    for t, i in _later(~gates, stages):
        more = gates.copy()
        more[t, i] = True
        yield more
        for s, j in opened:
            trial = more.copy()
            trial[s, j] = False
            yield trial


def path(task: Task, surrogate: Surrogate, gates: Gates, swaps_at_most: int = MAX_SWAPS) -> list[Gates]:
    """Patterns within the budget on the way from `gates` to a local optimum of the predicted error, best swap first."""
    way: list[Gates] = []
    loss = surrogate.loss(gates)
    while len(way) < swaps_at_most:
        best = None
        for trial in swaps(gates, task.stages):
            if (value := surrogate.loss(trial)) < loss and task.fits(trial):
                best, loss = task.layout.closure(trial, task.reuse), value
        if best is None:
            break
        gates = best
        way.append(gates)
    return way


def evenly(task: Task) -> Gates:
    """Whole steps that run, evenly spaced from the first on, as many as the budget allows; first steps always."""
    calls, units = task.sampler.calls, len(task.layout.units)
    gates = np.zeros((calls, units), dtype=bool)
    for count in range(calls, 1, -1):
        gates[:] = False
        gates[[*task.stages, *(np.arange(count) * calls // count)]] = True
        if task.fits(gates):
            return gates
    gates[:] = False
    gates[list(task.stages)] = True
    return gates


def slides(gates: Gates, stages: Sequence[int] = (0,)) -> list[Gates]:
    """Every pattern with two neighbouring steps changed over, where that changes anything; first steps stay."""
    found = []
    for t in range(len(gates) - 1):
        if not {t, t + 1} & set(stages) and (gates[t] != gates[t + 1]).any():
            trial = gates.copy()
            trial[[t, t + 1]] = trial[[t + 1, t]]
            found.append(trial)
    return found


def slide(
    task: Task, gates: Gates, seeds: Sequence[int], full: Tensor, generations: float = MAX_SLIDING
) -> Gates:
    """Moves whole calls to neighbouring places, each time the move that lowers the real error most, until none does.

    Costs nothing of the budget, for the same units run as often. Where few calls are left the recorded prediction is
    far from what it was recorded on, and a generation costs little: so each move is tried for real.

    Args:
        full: Latents of the full run on `seeds`.
        generations: What the trials may cost together, in full generations.
    """
    error = log_error(task.run(gates, seeds), full)
    while True:
        trials = slides(gates, task.stages)
        generations -= len(trials) * task.macs.share(gates)
        if not trials or generations < 0:
            return gates
        least, best = min((log_error(task.run(g, seeds), full), i) for i, g in enumerate(trials))
        if least >= error:
            return gates
        gates, error = trials[best], least


def refine(
    task: Task,
    gates: Gates,
    seeds: Sequence[int],
    full: Tensor,
    compare: Sequence[int],
    full_compare: Tensor,
    rounds: int,
    projections: int,
    advance: Callable[..., None] = lambda count, title=None: None,
) -> list[Gates]:
    """Coordinate descent on real generations: each round records the present gates anew and follows what that says.

    The surrogate is exact only near the generation it was recorded on. So a round tries the way
    to its optimum from the far end: the whole way, then half the swaps, a quarter, down to one;
    the first that lowers the real error is kept, and a round without one is the last.

    Args:
        seeds: Images to record, with `full`, the latents of their full run.
        compare: Images that decide, others than those recorded, with `full_compare`.
        projections: Backward passes per round.
        advance: Called with 1 after each round.

    Returns:
        The gates kept, in order, beginning with those given. The first rounds are the same however many follow.
    """
    line = [gates]
    error = log_error(task.run(gates, compare), full_compare)
    for done in range(rounds):
        surrogate = record(task.sampler, task.layout, task.reuse, task.order, seeds, projections, gates, full)
        way = path(task, surrogate, gates)
        length = len(way)
        while length:
            trial_error = log_error(task.run(way[length - 1], compare), full_compare)
            if trial_error < error:
                gates, error = way[length - 1], trial_error
                line.append(gates)
                break
            length //= 2
        # Of the latents, with noise of unit size as the peak.
        advance(1, f"Refining: {-10 * error:.1f} dB")
        if not length:
            advance(rounds - done - 1)
            break
    return line


def likeness(
    task: Task, gates: Gates, seeds: Sequence[int], full: Tensor, forecasts: Forecasts | None = None
) -> Tensor:
    """PSNR in dB of each decoded image to `full`, those of the full run: what a plan is stated by.

    Latents tell another story: what overshoots the range of images does not show in them.
    """
    with torch.no_grad():
        return psnr(task.sampler.decode(task.run(gates, seeds, forecasts)), full)


def surest(task: Task, line: Sequence[Gates], seeds: Sequence[int], full: Tensor) -> Gates:
    """The last gates of `line` that are better than those chosen before them by more than chance.

    Whoever chooses among many on few images chooses what fits those. So `seeds` are none that the line was made on, and
    a gain counts if it is more than one standard error of its mean over images: a longer line ends where
    a shorter one does, or better on `seeds`.

    Args:
        full: Images of the full run on `seeds`.
    """
    chosen, reached = line[0], likeness(task, line[0], seeds, full)
    for gates in line[1:]:
        trial = likeness(task, gates, seeds, full)
        if _sure(trial - reached):
            chosen, reached = gates, trial
    return chosen


def _sure(gain: Tensor) -> bool:
    """Whether a gain on some images is more than one standard error of its mean."""
    return bool(gain.mean() > gain.std(correction=0) / len(gain) ** 0.5)


def foresee(
    task: Task,
    gates: Gates,
    seeds: Sequence[int],
    full: Tensor,
    judges: Sequence[int],
    full_judges: Tensor,
    projections: int,
) -> Forecasts | None:
    """Kinds of forecast for every closed gate by itself, if they are surely better on `judges` than the task's order.

    Args:
        seeds: Images to record around `gates`, with `full`, the latents of their full run.
        full_judges: Images of the full run on `judges`.
    """
    surrogate = record(task.sampler, task.layout, task.reuse, task.order, seeds, projections, gates, full)
    kinds, _ = surrogate.forecasts(task.layout.closure(gates, task.reuse))
    plain = likeness(task, gates, judges, full_judges)
    return kinds if _sure(likeness(task, gates, judges, full_judges, kinds) - plain) else None

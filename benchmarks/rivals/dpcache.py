"""DPCache (arXiv 2602.22654): which steps to compute, by dynamic programming over a calibrated cost tensor.

Own implementation of the paper's idea, on the same programme as our search's schedules; none of its authors' code is used. The full run of a few calibration seeds is recorded. If
step i is computed, and the step computed before it is h, every step until the next computed one, j, is forecast from the values at
i and h. What these forecasts err by is the cost of h, i, j: of three steps, because a straight line depends on both that it is drawn
through. The programme finds, among all schedules of K computed steps that begin with the first, the one whose costs sum to least.
The schedule is the same for every image.

Abstract and summaries of the paper, which is what this was written from, leave open how errors are measured and what is forecast. So two ways of
each are tried, as are two orders of forecast and two numbers of first steps that are always computed: what is nearest to the full run on the
calibration seeds, in PSNR, stands for DPCache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfp_vllm.dipgo.forecast import Forecasts, coefficients
from sdfp_vllm.dipgo.layout import WHOLE, Gates
from sdfp_vllm.dipgo.quality import psnr
from sdfp_vllm.dipgo.schedule import best_path
from sdfp_vllm.dipgo.streams import argument
from sdfp_vllm.dipgo.task import Task

KINDS = ("0", "1")  # the last value, or the straight line (Taylor's first order)
FIRST_FULL = (1, 3)
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute": lambda error: error.abs().mean(),
    "squared": lambda error: error.square().mean(),
}
_IMAGE = "hidden_states"


@dataclass(frozen=True)
class Schedule:
    """The best schedule found for a budget, how its skipped steps are forecast, and by which setting it was found."""

    task: Task
    gates: Gates
    forecasts: Forecasts
    setting: str


def search(
    tasks: Sequence[Task], budgets: Sequence[float], slack: float, seeds: Sequence[int]
) -> list[Schedule]:
    """The best schedule for each budget.

    Args:
        tasks: What may be forecast in a skipped step: the network's output, or what all of its blocks add.
        slack: What a schedule may cost over its budget.
        seeds: Of the calibration images.
    """
    with torch.no_grad():
        full = tasks[0].sampler.latents(seeds)
    recordings = [recorded(task, seeds) for task in tasks]
    tables = {
        (i, kind, norm): cost_tensor(recording, kind, NORMS[norm])
        for (i, recording), kind, norm in product(enumerate(recordings), KINDS, NORMS)
    }
    found = []
    for budget in budgets:
        tried: dict[tuple[int, str, tuple[int, ...]], str] = {}
        for ((i, kind, norm), table), first in product(tables.items(), FIRST_FULL):
            count = most_steps(tasks[i], budget + slack)
            if first <= count:
                steps = tuple(best_path(table, count, range(first)))
                reused = "output" if tasks[i].layout == WHOLE else "residual"
                tried.setdefault(
                    (i, kind, steps), f"{reused}, order {kind}, {norm} error, first {first} computed"
                )
        schedules = [_schedule(tasks[i], steps, kind, setting) for (i, kind, steps), setting in tried.items()]
        found.append(max(schedules, key=lambda s: _nearness(s, seeds, full)))
    return found


def recorded(task: Task, seeds: Sequence[int]) -> Tensor:
    """What can be forecast in each step of the full run: (steps, values).

    The network's output; or, for residual reuse of a chain of blocks, what all of them together add to the image's stream. The sum of the blocks'
    forecasts is the forecast of their sum.
    """
    values: list[Tensor] = []
    with torch.no_grad(), listening(task, values.append):
        task.sampler.latents(seeds)
    if len(values) != task.sampler.calls:
        raise ValueError(
            f"{len(values)} calls of the denoiser in {task.sampler.calls} steps; one per step is needed"
        )
    return torch.stack(values).flatten(1)


@contextmanager
def listening(task: Task, noted: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `noted` with what can be forecast (`recorded`), in every call of the denoiser."""
    modules = task.layout.modules(task.sampler.denoiser)
    entered: list[Tensor] = []

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        entered[:] = [argument(module, _IMAGE, args, kwargs).clone()]

    def after(module: Any, args: tuple, output: Any) -> None:
        if task.layout == WHOLE:
            noted(output[0].clone())
            return
        place = next(s.place for s in task.layout.units[-1].streams if s.argument == _IMAGE)
        noted((output if isinstance(output, Tensor) else output[place]) - entered[0])

    handles = [modules[-1].register_forward_hook(after)]
    if task.layout != WHOLE:
        handles.append(modules[0].register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cost_tensor(values: Tensor, kind: str, norm: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
    """What forecasts err by between computed steps: cost[h + 1, i + 1, j + 1] with h, i, j computed one after the other.

    The index 0 in place of h + 1 says that nothing was computed before i, and the last index in place of j + 1 that nothing
    is computed after. What cannot be is infinite.

    Args:
        values: Of each step of the full run, (steps, values).
        kind: Of forecast (`forecast.KINDS`), of an order up to 1.
    """
    steps = len(values)
    cost = np.full((steps + 2,) * 3, np.inf)
    for i in range(steps):
        for h in range(i) if i else (-1,):
            computed = [i, h] if i else [i]
            summed = 0.0
            for j in range(i + 1, steps + 1):
                cost[h + 1, i + 1, j + 1] = summed
                if j < steps:
                    factors = coefficients(kind, j, computed)
                    forecast = sum(f * values[s] for f, s in zip(factors, computed, strict=False))
                    summed += norm(forecast - values[j]).item()
    return cost


def path_cost(cost: NDArray[np.float64], steps: Sequence[int]) -> float:
    """What a schedule costs: the sum over each of its steps, with the one before and the one after."""
    nodes = [0, *(step + 1 for step in steps), len(cost) - 1]
    return float(sum(cost[a, b, c] for a, b, c in zip(nodes, nodes[1:], nodes[2:], strict=False)))


def most_steps(task: Task, share: float) -> int:
    """How many steps can be computed for `share` of the full run's MACs."""
    calls = task.sampler.calls
    return max(n for n in range(1, calls + 1) if task.macs.share(_rows(task, range(n))) <= share)


def _rows(task: Task, steps: Sequence[int]) -> Gates:
    gates = np.zeros((task.sampler.calls, len(task.layout.units)), dtype=bool)
    gates[list(steps)] = True
    return gates


def _schedule(task: Task, steps: Sequence[int], kind: str, setting: str) -> Schedule:
    gates = _rows(task, steps)
    return Schedule(task, gates, np.full(gates.shape, kind), setting)


def _nearness(schedule: Schedule, seeds: Sequence[int], full: Tensor) -> float:
    made = schedule.task.run(schedule.gates, seeds, schedule.forecasts)
    return float(psnr(made, full).mean())

"""Chooses gates, and the forecasts of those closed, on the prediction alone: closes one by one, then swaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sdfp_vllm.dipgo.columns import Columns
from sdfp_vllm.dipgo.layout import Gates
from sdfp_vllm.dipgo.prediction import Surrogate, improves
from sdfp_vllm.dipgo.task import Pattern, Task

MAX_SWAPS = 8


def greedy(
    task: Task, surrogate: Surrogate, pattern: Pattern | None = None, kinds: str | None = None
) -> Pattern:
    """Closes gates one by one, each time the one with the least predicted error per cost saved, down to the budget.

    Args:
        pattern: The gates to begin with; all open by default.
        kinds: The forecasts to choose from for each gate that is closed; by default that of the task's order.
    """
    kinds = kinds or str(task.order)
    if pattern is None:
        everything = np.ones((task.sampler.calls, len(task.layout.units)), dtype=bool)
        pattern = Pattern.of(everything, kinds[0])
    if not surrogate.additive:
        pattern = _greedy_any(task, surrogate, pattern)
        return pattern if len(kinds) == 1 else _foretold(surrogate, pattern, kinds)
    columns = Columns(task, surrogate, pattern)
    while not task.fits(columns.pattern.gates) and columns.close_cheapest(kinds):
        pass
    return columns.pattern


def path(
    task: Task,
    surrogate: Surrogate,
    pattern: Pattern,
    kinds: str | None = None,
    swaps_at_most: int = MAX_SWAPS,
) -> list[Pattern]:
    """Patterns within the budget on the way from `pattern` to a local optimum of the predicted error, best swap first.

    A swap opens one gate, and closes another or none. Where there is a choice of `kinds`, forecasts are chosen again after each.
    """
    kinds = kinds or str(task.order)
    way: list[Pattern] = []
    while len(way) < swaps_at_most:
        if surrogate.additive:
            best = Columns(task, surrogate, pattern).best_swap(kinds)
        else:
            best = _best_swap_any(task, surrogate, pattern)
        if best is None:
            break
        pattern = best if len(kinds) == 1 else _foretold(surrogate, best, kinds)
        way.append(pattern)
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


def _foretold(surrogate: Surrogate, pattern: Pattern, kinds: str) -> Pattern:
    return Pattern(pattern.gates, surrogate.choose_kinds(pattern.gates, pattern.kinds, kinds))


def _greedy_any(task: Task, surrogate: Surrogate, pattern: Pattern) -> Pattern:
    """`greedy` where closing a gate makes others useless."""
    gates, kinds = pattern.gates.copy(), pattern.kinds
    while not task.fits(gates):
        share, loss = task.cost.share(gates), surrogate.loss(gates, kinds)
        best, best_price = gates, np.inf
        for t, i in _later(gates, task.stages):
            trial = gates.copy()
            trial[t, i] = False
            trial = task.layout.closure(trial, task.reuse)
            price = (surrogate.loss(trial, kinds) - loss) / (share - task.cost.share(trial))
            if price < best_price:
                best, best_price = trial, price
        if best is gates:
            break  # nothing is left to close but the first call
        gates = best
    return Pattern(gates, kinds)


def _best_swap_any(task: Task, surrogate: Surrogate, pattern: Pattern) -> Pattern | None:
    """The best swap where closing a gate makes others useless; None if none lowers the loss."""
    best: Gates | None = None
    loss = surrogate.loss(pattern.gates, pattern.kinds)
    for trial in _swaps(pattern.gates, task.stages):
        if improves(value := surrogate.loss(trial, pattern.kinds), loss) and task.fits(trial):
            best, loss = trial, value
    return None if best is None else Pattern(task.layout.closure(best, task.reuse), pattern.kinds)


def _later(which: Gates, stages: Sequence[int]) -> list[tuple[int, int]]:
    """(step, unit) of every True entry but those of the steps in which a denoiser takes over."""
    return [(int(t), int(i)) for t, i in np.argwhere(which) if t not in stages]


def _swaps(gates: Gates, stages: Sequence[int] = (0,)) -> Iterator[Gates]:
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

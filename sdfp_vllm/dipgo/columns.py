"""Moves on the prediction where a unit's error depends on its own gates alone: pairs of moves cost an addition each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdfp_vllm.dipgo.prediction import Surrogate, Vector, improves
from sdfp_vllm.dipgo.task import Pattern, Task

_ROUNDING = 1e-9  # of shares of the cost


class Move(NamedTuple):
    """One unit's column changed.

    Attributes:
        runs, kinds: (steps,): its gates and forecasts afterwards.
        sums, squares: What is added to the pattern's (`Surrogate.total`).
        share: What is added to the share of the cost; negative where something is closed.
    """

    unit: int
    runs: NDArray[np.bool_]
    kinds: NDArray[np.str_]
    sums: Vector
    squares: float
    share: float


class Columns:
    """A pattern, and the moves from it with what is predicted of each."""

    def __init__(self, task: Task, surrogate: Surrogate, pattern: Pattern):
        self._task, self._surrogate = task, surrogate
        self._units = range(len(task.layout.units))
        self._closings: dict[int, list[Move]] = {}
        self._take(pattern)

    def _take(self, pattern: Pattern) -> None:
        self.pattern = pattern
        gates, kinds = pattern.gates, pattern.kinds
        self._now = [self._surrogate.column(i, gates[:, i], kinds[:, i]) for i in self._units]
        self._sums: Vector = np.sum([sums for sums, _ in self._now], axis=0)
        self._squares = float(sum(squares for _, squares in self._now))
        self._loss = float(self._surrogate.value(self._sums, self._squares))

    def close_cheapest(self, kinds: str) -> bool:
        """Closes the gate with the least predicted error per cost saved, forecast by one of `kinds`; False if all are closed."""
        for i in self._units:
            if i not in self._closings:
                self._closings[i] = self._closed(i, kinds)
        moves = [move for i in self._units for move in self._closings[i]]
        if not moves:
            return False
        prices = (self._losses(moves) - self._loss) / -np.array([move.share for move in moves])
        best = moves[int(np.argmin(prices))]
        self._take(self._after(best))
        # What another unit's moves add is as it was.
        del self._closings[best.unit]
        return True

    def best_swap(self, kinds: str) -> Pattern | None:
        """What opening a gate, and closing another or none, gives within the budget with the least loss; None if no less than now."""
        left = self._task.budget + _ROUNDING - self._task.cost.share(self.pattern.gates)
        opened = [move for i in self._units for move in self._opened(i)]
        closed = [move for i in self._units for move in self._closed(i, kinds)]
        if not opened:
            return None
        # Within one unit both change one column.
        alone = [*opened, *(both for move in opened for both in self._closed(move.unit, kinds, move))]
        alone = [move for move in alone if move.share <= left]
        best: Pattern | None = None
        loss = self._loss
        if alone and (losses := self._losses(alone)).min() < loss:
            best, loss = self._after(alone[int(losses.argmin())]), float(losses.min())
        if closed:
            units = np.array([move.unit for move in closed])
            shares = np.array([move.share for move in closed])
            for move in opened:
                losses = self._losses(closed, move)
                losses[(units == move.unit) | (shares + move.share > left)] = np.inf
                if losses.min() < loss:
                    best, loss = self._after(move, closed[int(losses.argmin())]), float(losses.min())
        return best if improves(loss, self._loss) else None

    def _losses(self, moves: list[Move], first: Move | None = None) -> Vector:
        """The loss after each of `moves`, and after `first` of another unit too if that is given."""
        sums = np.array([move.sums for move in moves]) + (
            self._sums if first is None else self._sums + first.sums
        )
        squares = np.array([move.squares for move in moves]) + (
            self._squares if first is None else self._squares + first.squares
        )
        return self._surrogate.value(sums, squares)

    def _after(self, *moves: Move) -> Pattern:
        gates, kinds = self.pattern.gates.copy(), self.pattern.kinds.copy()
        for move in moves:
            gates[:, move.unit], kinds[:, move.unit] = move.runs, move.kinds
        return Pattern(gates, kinds)

    def _opened(self, unit: int) -> list[Move]:
        """Every way to open one gate of a unit."""
        runs, kinds = self.pattern.gates[:, unit], self.pattern.kinds[:, unit]
        found = []
        for t in np.flatnonzero(~runs):
            more = runs.copy()
            more[t] = True
            found.append(self._move(unit, more, kinds))
        return found

    def _closed(self, unit: int, allowed: str, first: Move | None = None) -> list[Move]:
        """Every way to close one gate of a unit; after the move `first` of the same unit, another gate than that opened."""
        now = self.pattern.gates[:, unit]
        runs, kinds = (now, self.pattern.kinds[:, unit]) if first is None else (first.runs, first.kinds)
        found = []
        for t in np.flatnonzero(runs & now):
            if t in self._task.stages:
                continue
            less = runs.copy()
            less[t] = False
            for kind in allowed:
                chosen = kinds.copy()
                chosen[t] = kind
                found.append(self._move(unit, less, chosen))
        return found

    def _move(self, unit: int, runs: NDArray[np.bool_], kinds: NDArray[np.str_]) -> Move:
        sums, squares = self._surrogate.column(unit, runs, kinds)
        more = int(runs.sum()) - int(self.pattern.gates[:, unit].sum())
        was = self._now[unit]
        return Move(
            unit, runs, kinds, sums - was[0], squares - was[1], more * float(self._task.unit_shares[unit])
        )

"""Predicts what any pattern of gates does to the images, from a table of inner products (surrogate.py records it).

With e(g) the projected error of one closed gate, a vector with an entry for every projection of every image, the
images move by the sum of them all, and what is predicted is its weighted mean square. The projections are few
(4 for each of 8 images) and the gates many (160 on a small transformer), so a search that sees only that sum finds gates whose errors happen to
cancel on these projections, and on no others. `caution` mixes in the sum of the gates' own squares, which is what independent errors
would give: 0 believes every cancellation, 1 none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdfp_vllm.dipgo.forecast import KINDS, Forecasts, coefficients
from sdfp_vllm.dipgo.layout import Gates, Layout

CAUTION = 0.5  # of a search's predictions
_ROUNDING = 1e-9
_REMEMBERED = 200_000
_MOST_VALUES = 3  # that a forecast takes

Vector = NDArray[np.float64]


def improves(loss: float, on: float) -> bool:
    """Whether a loss is less than another by more than rounding; with caution, far from the recording, either may be negative."""
    return loss < on - _ROUNDING * abs(on)


class Surrogate:
    """Predicted error of gates, linear in each unit's own error around the generation that was recorded.

    Args:
        table: (projections, units, steps, steps): P as in surrogate.py; entry [.., t, a] for a <= t.
        order: The kind of forecast where none is given.
        around: The gates of the recorded generation, and the `kinds` its closed ones were forecast by (None: the order's).
        offset: (projections,): the projections of its images' error; zeros for the full run.
        stages: The steps at which a denoiser takes over.
        weights: (projections,), positive; equal by default. They are scaled to sum to 1.
        caution: How little cancellation of errors is believed, in [0, 1].
    """

    def __init__(
        self,
        table: NDArray,
        layout: Layout,
        reuse: str,
        order: int,
        around: Gates,
        offset: NDArray,
        stages: Sequence[int] = (0,),
        weights: NDArray | None = None,
        caution: float = 0.0,
        kinds: Forecasts | None = None,
    ):
        self._table, self._layout, self._reuse, self._order = table, layout, reuse, order
        self._stages = set(stages)
        weights = np.ones(len(table)) if weights is None else weights
        self._scale = np.sqrt(weights / weights.sum())
        self._caution = caution
        self._errors: dict[tuple[int, int, str, tuple[int, ...]], tuple[Vector, float]] = {}
        self._columns: dict[tuple[int, bytes, bytes, str], tuple[Vector, float]] = {}
        self.offset: Vector = offset * self._scale
        self._squared = float(self.offset @ self.offset)
        sums, squares = self.total(around, kinds)
        self._base = self.offset - sums
        self._own = self._squared - squares

    def with_caution(self, caution: float) -> Surrogate:
        """The same recording, read with another caution."""
        other = copy.copy(self)
        other._caution = caution
        return other

    def whole(self) -> Surrogate:
        """The same with all units as one, which runs or not; for additive ones, whose errors of a step sum up."""
        other = copy.copy(self)
        other._table = self._table.sum(1, keepdims=True)
        other._errors, other._columns = {}, {}
        return other

    @property
    def additive(self) -> bool:
        """Whether what a unit errs by depends on its own gates alone: every unit always reaches the prediction."""
        units = self._layout.units
        return self._reuse == "residual" or len(units) == 1 or all(unit.branch for unit in units)

    @property
    def order(self) -> str:
        """The kind of forecast where none is given."""
        return str(self._order)

    def loss(self, gates: Gates, kinds: Forecasts | None = None) -> float:
        """Predicted mean squared error of the images, summed over an image's elements."""
        return float(self.value(*self.total(gates, kinds)))

    def value(self, sums: Vector, squares: float | Vector) -> Vector:
        """The loss of a pattern whose gates' errors sum to `sums` (.., projections), and their squares to `squares` (..)."""
        moved = self._base + sums
        together = (moved * moved).sum(-1)
        return (1 - self._caution) * together + self._caution * (self._own + squares)

    def total(self, gates: Gates, kinds: Forecasts | None = None) -> tuple[Vector, float]:
        """The errors of all reused values that reach the prediction: their sum (projections,), and the sum of their squares."""
        if kinds is None:
            kinds = np.full(gates.shape, self.order)
        live = self._layout.live(gates, self._reuse)
        columns = [
            self.column(i, gates[:, i] & live[:, i], kinds[:, i], live[:, i]) for i in range(gates.shape[1])
        ]
        return np.sum([c[0] for c in columns], axis=0), sum(c[1] for c in columns)

    def column(
        self,
        unit: int,
        runs: NDArray[np.bool_],
        kinds: NDArray[np.str_],
        live: NDArray[np.bool_] | None = None,
    ) -> tuple[Vector, float]:
        """The same for one unit, from the steps in which it runs; remembered, for searches change a unit or two at a time."""
        reused = ~runs if live is None else live & ~runs
        key = (unit, runs.tobytes(), reused.tobytes(), "".join(kinds[reused].tolist()))
        if key not in self._columns:
            if len(self._columns) > _REMEMBERED:
                self._columns.clear()
            sums, squares = np.zeros(len(self._scale)), 0.0
            computed: tuple[int, ...] = ()
            for t in range(len(runs)):
                if t in self._stages:
                    computed = ()
                if runs[t]:
                    computed = (t, *computed[: _MOST_VALUES - 1])
                elif reused[t]:
                    error, square = self.error(unit, t, str(kinds[t]), computed)
                    sums, squares = sums + error, squares + square
            self._columns[key] = sums, squares
        return self._columns[key]

    def error(self, unit: int, step: int, kind: str, computed: tuple[int, ...]) -> tuple[Vector, float]:
        """What a forecast in one step errs by, from the values of the steps `computed`, latest first; and its square."""
        key = (unit, step, kind, computed[: KINDS[kind] + 1])
        if key not in self._errors:
            table = self._table[:, unit, step]
            error = -table[:, step]
            for c, s in zip(coefficients(kind, step, key[3]), key[3], strict=False):
                error = error + c * table[:, s]
            error = error * self._scale
            self._errors[key] = error, float(error @ error)
        return self._errors[key]

    def choose_kinds(
        self,
        gates: Gates,
        kinds: Forecasts | None = None,
        allowed: Sequence[str] = tuple(KINDS),
        sweeps: int = 4,
    ) -> Forecasts:
        """For each closed gate the kind of forecast with which the loss is least: (steps, units) of `forecast.KINDS`.

        What a forecast errs by is in the table, for every kind: so each is chosen exactly, given the others. They are gone
        through in turn, from `kinds`, until none changes or `sweeps` are done.
        """
        kinds = np.full(gates.shape, self.order) if kinds is None else kinds.copy()
        sums, squares = self.total(gates, kinds)
        places = self._reused(gates)
        for _ in range(sweeps):
            changed = False
            for t, i, computed in places:
                errors = {k: self.error(i, t, k, computed) for k in (str(kinds[t, i]), *allowed)}
                now = errors[str(kinds[t, i])]
                rest, own = sums - now[0], squares - now[1]
                losses = {k: float(self.value(rest + e, own + s)) for k, (e, s) in errors.items()}
                best = min(losses, key=lambda k: losses[k])
                if improves(losses[best], losses[str(kinds[t, i])]):
                    kinds[t, i], changed = best, True
                    sums, squares = rest + errors[best][0], own + errors[best][1]
            if not changed:
                break
        return kinds

    def _reused(self, gates: Gates) -> list[tuple[int, int, tuple[int, ...]]]:
        """(step, unit, steps of its values, latest first) of every value that is reused and reaches the prediction."""
        live = self._layout.live(gates, self._reuse)
        found = []
        for i in range(gates.shape[1]):
            computed: tuple[int, ...] = ()
            for t in range(len(gates)):
                if t in self._stages:
                    computed = ()
                if gates[t, i] and live[t, i]:
                    computed = (t, *computed[: _MOST_VALUES - 1])
                elif live[t, i]:
                    found.append((t, i, computed))
        return found

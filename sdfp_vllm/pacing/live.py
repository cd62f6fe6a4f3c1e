"""LiveCosts: the plan's costs, corrected by a clock while serving.

A plan is made on an idle machine and times the model's own work; serving adds the engine's, shares the machine with
others, or runs on another one. The shape of the plan's curves is kept, their height follows what is measured.
"""

from __future__ import annotations

from math import floor, log2

from sdfp_vllm.pacing.odds import Average
from sdfp_vllm.pacing.record import Pacing

_WEIGHT = 4.0  # observations that the plan's own figure is worth
_MEMORY = 64.0
_FURTHEST = 4.0  # what is further off than by this factor was an interruption, not a cost


class _Curve:
    """Measured over planned time, at powers of two of rows; linear between them, and that of all where nothing is measured."""

    def __init__(self) -> None:
        self._all = Average(1.0, _WEIGHT, _MEMORY)
        self._at: dict[int, Average] = {}

    def factor(self, rows: int) -> float:
        where = log2(rows)
        low = floor(where)
        left, right = (self._at.get(i, self._all).value for i in (low, low + 1))
        return left + (right - left) * (where - low)

    def observe(self, rows: int, planned: float, measured: float) -> None:
        factor = measured / planned
        if not 1 / _FURTHEST < factor < _FURTHEST:
            return
        near = round(log2(rows))
        if near not in self._at:
            self._at[near] = Average(self._all.value, _WEIGHT, _MEMORY)
        self._at[near].observe(factor)
        self._all.observe(factor)


class LiveCosts:
    """What a policy asks of costs, from `plan` and what `verified` and `stepped` are told."""

    def __init__(self, plan: Pacing):
        self.plan = plan
        self.acceptance, self.confidence = plan.acceptance, plan.confidence
        self._verify, self._step = _Curve(), _Curve()

    def verify_ms(self, rows: int) -> float:
        """The target's step over `rows` rows, with all that a round pays besides drafting."""
        return (self.plan.verify_ms(rows) + self.plan.round_overhead_ms) * self._verify.factor(rows)

    def step_ms(self, batch: int) -> float:
        """One draft step for `batch` requests."""
        return self.plan.step_ms(batch) * self._step.factor(batch)

    def plain_rate(self, batch: int) -> float:
        """Tokens per millisecond of plain decoding, all requests together."""
        return batch / self.verify_ms(batch)

    def verified(self, rows: int, ms: float) -> None:
        """Learns how long a target's step over `rows` rows took, from one drafting to the next."""
        self._verify.observe(rows, self.plan.verify_ms(rows) + self.plan.round_overhead_ms, ms)

    def stepped(self, batch: int, ms: float) -> None:
        """Learns how long one draft step took."""
        self._step.observe(batch, self.plan.step_ms(batch), ms)

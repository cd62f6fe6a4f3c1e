"""LiveCosts: the plan's costs, corrected by a clock while serving.

A plan is made on an idle machine and times the model's own work; serving adds the engine's, shares the machine with
others, or runs on another one. The shape of the plan's curves is kept, their height follows what is measured.
"""

from __future__ import annotations

from math import exp, floor, log, log2

from sdfp_vllm.pacing.record import Pacing

_SLOWEST = 1 / 16  # weight of the newest time, once there are many
_FURTHEST = 0.7  # a time counts as at most this far from what is known (in logarithm): pauses are no costs


class _Factor:
    """Measured over planned time: a fading mean of logarithms that no single time moves far."""

    def __init__(self, log_factor: float = 0.0):
        self.log, self._times = log_factor, 0

    def observe(self, log_factor: float) -> None:
        self._times += 1
        weight = max(_SLOWEST, 1 / (self._times + 4))
        self.log += weight * max(-_FURTHEST, min(_FURTHEST, log_factor - self.log))


class _Curve:
    """Factors at powers of two of rows; linear between them, and that of all where nothing is measured."""

    def __init__(self) -> None:
        self._all = _Factor()
        self._at: dict[int, _Factor] = {}

    def factor(self, rows: int) -> float:
        where = log2(rows)
        low = floor(where)
        left, right = (self._at.get(i, self._all).log for i in (low, low + 1))
        return exp(left + (right - left) * (where - low))

    def observe(self, rows: int, planned: float, measured: float) -> None:
        near = round(log2(rows))
        if near not in self._at:
            self._at[near] = _Factor(self._all.log)
        for known in (self._at[near], self._all):
            known.observe(log(measured / planned))


class LiveCosts:
    """What a policy asks of costs, from `plan` and what `verified` and `stepped` are told."""

    def __init__(self, plan: Pacing):
        self.plan = plan
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

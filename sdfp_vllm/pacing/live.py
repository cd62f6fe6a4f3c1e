"""LiveCosts: the plan's costs, corrected by a clock while serving.

A plan is made on an idle machine and times the model's own work; serving adds the engine's, shares the machine with
others, or runs on another one. The shape of the plan's curves is kept, their height follows what is measured.
"""

from __future__ import annotations

from math import log, log2

import numpy as np

from sdfp_vllm.pacing.record import Pacing

_SLOWEST = 1 / 16  # weight of the newest time, once there are many
_FURTHEST = 0.7  # a time counts as at most this far from what is known (in logarithm): pauses are no costs


class _Factor:
    """Measured over planned time: a fading mean of logarithms that no single time moves far."""

    def __init__(self, log_factor: float = 0.0):
        self.log, self._times = log_factor, 0

    def observe(self, log_factor: float) -> None:
        self._times += 1
        weight = max(_SLOWEST, 1 / (self._times + 2))
        self.log += weight * max(-_FURTHEST, min(_FURTHEST, log_factor - self.log))


class _Curve:
    """Factors at powers of two of rows; linear between them, and that of all where nothing is measured."""

    def __init__(self) -> None:
        self._all = _Factor()
        self._at: dict[int, _Factor] = {}

    def factors(self, most: int) -> np.ndarray:
        """For 1, 2, ... `most` rows, float64 [most]."""
        powers = range(most.bit_length() + 1)
        logs = [self._at.get(i, self._all).log for i in powers]
        return np.exp(np.interp(np.log2(np.arange(1, most + 1)), powers, logs))

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
        self._planned = np.zeros(1)  # milliseconds of 0, 1, ... rows
        self._verify_ms: list[float] = []  # the same, corrected; a round asks for a hundred of them

    def verify_ms(self, rows: int) -> float:
        """The target's step over `rows` rows, with all that a round pays besides drafting."""
        if rows >= len(self._verify_ms):
            if rows >= len(self._planned):
                self._planned = np.array([0.0, *map(self._planned_ms, range(1, 2 * rows + 1))])
            factors = self._verify.factors(len(self._planned) - 1)
            self._verify_ms = [0.0, *(self._planned[1:] * factors).tolist()]
        return self._verify_ms[rows]

    def step_ms(self, batch: int) -> float:
        """One draft step for `batch` requests."""
        return self.plan.step_ms(batch) * float(self._step.factors(batch)[-1])

    def plain_rate(self, batch: int) -> float:
        """Tokens per millisecond of plain decoding, all requests together."""
        return batch / self.verify_ms(batch)

    def verified(self, rows: int, ms: float) -> None:
        """Learns how long a target's step over `rows` rows took, from one drafting to the next."""
        self._verify.observe(rows, self._planned_ms(rows), ms)
        self._verify_ms = []

    def stepped(self, batch: int, ms: float) -> None:
        """Learns how long one draft step took."""
        self._step.observe(batch, self.plan.step_ms(batch), ms)

    def _planned_ms(self, rows: int) -> float:
        return self.plan.verify_ms(rows) + self.plan.round_overhead_ms

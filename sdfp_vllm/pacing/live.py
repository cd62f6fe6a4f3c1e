"""LiveCosts: the plan's costs, corrected by a clock while serving.

A plan is made on an idle machine and times the model's own work on short contexts; serving adds the engine's, shares the
machine with others, or runs on another one, and reads the K/V of whatever its requests have come to. The shape of the plan's
curves is kept, their height follows what is measured, and beside it what a token of context costs:

    verification  planned(rows) * factor + context * (first * requests + more * extra rows)
    draft step    planned(batch) * factor + seen * first * requests

Rounds on short contexts teach the factors, those on long ones what a token of context costs.
"""

from __future__ import annotations

from math import exp, log, log2
from typing import Any, NamedTuple

import numpy as np

from sdfp_vllm.pacing.record import Pacing

_SLOWEST = 1 / 16  # weight of the newest time, once there are many
_FURTHEST = 0.7  # a time counts as at most this far from what is known (in logarithm): pauses are no costs
_LONG = 1024.0  # tokens of context from which on a time teaches what they cost, and below which all else
_LONG_SLOWEST = 1 / 8  # contexts change with every request
_LEAST = 0.3  # of a time, what a short context leaves to all else
# K/V are read once for all rows of a request, so that an error is sooner that of `first`: ratio of variances.
_ONE_READING = 64
_UNKNOWN, _FURTHEST_UNKNOWN = 8, 1.5  # for so many times at first, what they cost is not known at all


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


class _Reading:
    """Milliseconds that a token of context costs: one time for each request, and again for each further row of it."""

    def __init__(self) -> None:
        self.first = self.more = 0.0
        self._times = 0

    @property
    def known(self) -> bool:
        """Whether there was a time."""
        return self._times > 0

    def ms(self, context: float, requests: Any, extra: Any) -> Any:
        """For numbers of rows, or arrays of them."""
        return context * (self.first * requests + self.more * extra)

    def observe(self, expected: float, ms: float, context: float, requests: int, extra: int) -> None:
        """Takes the error of an expectation, as far as one time counts, along its gradient: what is read more takes more."""
        self._times += 1
        furthest = exp(_FURTHEST_UNKNOWN if self._times <= _UNKNOWN else _FURTHEST)
        error = max(expected / furthest, min(ms, expected * furthest)) - expected
        weight = max(_LONG_SLOWEST, 1 / self._times)
        step = weight * error / (context * (_ONE_READING * requests**2 + extra**2))
        self.first = max(0.0, self.first + step * _ONE_READING * requests)
        self.more = max(0.0, self.more + step * extra)


class Shares(NamedTuple):
    """What one request of a batch takes of a round, milliseconds: of a verification and of one more draft on no context, and reading."""

    verify: float
    draft: float
    read: _Reading
    read_by_step: _Reading

    def ms(self, context: float, seen: float) -> tuple[float, float]:
        """Of a verification, and of one more draft: its step and its row.

        Args:
            context: Tokens of context that the request has.
            seen: How many of them its draft steps read.
        """
        return (
            self.verify + self.read.ms(context, 1, 0),
            self.draft + self.read_by_step.ms(seen, 1, 0) + self.read.ms(context, 0, 1),
        )


class LiveCosts:
    """What a policy asks of costs, from `plan` and what `verified` and `stepped` are told.

    Args:
        plan: The plan's times, of short contexts.
    """

    def __init__(self, plan: Pacing):
        self.plan = plan
        self._verify, self._step = _Curve(), _Curve()
        self._read, self._read_by_step = _Reading(), _Reading()
        self._requests, self._context, self._seen = 1, 0.0, 0.0
        self._planned = np.zeros(1)  # milliseconds of 0, 1, ... rows
        self._verify_ms: list[float] = []  # the same, corrected; a round asks for a hundred of them

    def at(self, requests: int, context: float, seen: float) -> None:
        """Says what all that follows is about.

        Args:
            requests: In the batch.
            context: Tokens of context, the mean of its requests.
            seen: How many of them a draft step reads: fewer with a window.
        """
        self._requests, self._context, self._seen = requests, context, seen
        self._verify_ms = []

    def verify_ms(self, rows: int) -> float:
        """The target's step over `rows` rows, with all that a round pays besides drafting."""
        if rows >= len(self._verify_ms):
            if rows >= len(self._planned):
                self._planned = np.array([0.0, *map(self._planned_ms, range(1, 2 * rows + 1))])
            count = np.arange(1, len(self._planned))
            known = self._planned[1:] * self._verify.factors(len(self._planned) - 1)
            requests = np.minimum(count, self._requests)
            read = self._read.ms(self._context, requests, count - requests)
            self._verify_ms = [0.0, *(known + read).tolist()]
        return self._verify_ms[rows]

    def step_ms(self, batch: int) -> float:
        """One draft step for `batch` requests."""
        known = self.plan.step_ms(batch) * float(self._step.factors(batch)[-1])
        return known + self._read_by_step.ms(self._seen, batch, 0)

    @property
    def reading_is_known(self) -> bool:
        """Whether a long context has taught what a token of it costs."""
        return self._read.known

    def shares(self, batch: int) -> Shares:
        """What each request of a batch takes of a round."""
        known = self._verify.factors(2 * batch)
        verify = self._planned_ms(batch) * float(known[batch - 1])
        row = max(self._planned_ms(2 * batch) * float(known[-1]) - verify, 0.0)
        step = self.plan.step_ms(batch) * float(self._step.factors(batch)[-1])
        # Until drafts have read long contexts, a token takes them what it takes the target: they read the same K/V.
        read = self._read_by_step if self._read_by_step.known else self._read
        return Shares(verify / batch, (step + row) / batch, self._read, read)

    def plain_rate(self, batch: int) -> float:
        """Tokens per millisecond of plain decoding, all requests together."""
        return batch / self.verify_ms(batch)

    def verified(self, rows: int, ms: float) -> None:
        """Learns how long a target's step over `rows` rows took, from one drafting to the next."""
        requests = min(rows, self._requests)
        extra = rows - requests
        if self._context < _LONG:
            read = self._read.ms(self._context, requests, extra)
            self._verify.observe(rows, self._planned_ms(rows), max(ms - read, _LEAST * ms))
        else:
            self._read.observe(self.verify_ms(rows), ms, self._context, requests, extra)
        self._verify_ms = []

    def stepped(self, batch: int, ms: float) -> None:
        """Learns how long one draft step took."""
        if self._seen < _LONG:
            read = self._read_by_step.ms(self._seen, batch, 0)
            self._step.observe(batch, self.plan.step_ms(batch), max(ms - read, _LEAST * ms))
        else:
            self._read_by_step.observe(self.step_ms(batch), ms, self._seen, batch, 0)

    def _planned_ms(self, rows: int) -> float:
        return self.plan.verify_ms(rows) + self.plan.round_overhead_ms

"""Chances that follow the traffic: counts that fade, over a prior that fades with them."""

from __future__ import annotations

from collections.abc import Sequence

# A count halves after about 0.7 of this many newer ones in its bucket.
MEMORY = 256.0
PRIOR_WEIGHT = 16.0


class Odds:
    """A chance of acceptance per bucket.

    Args:
        prior: The chance to begin with, per bucket, worth `weight` observations.
    """

    def __init__(self, prior: Sequence[float], weight: float = PRIOR_WEIGHT, memory: float = MEMORY):
        self._accepted = [p * weight for p in prior]
        self._tried = [weight] * len(prior)
        self._fade = 1.0 - 1.0 / memory

    def __len__(self) -> int:
        return len(self._tried)

    def __getitem__(self, bucket: int) -> float:
        """The chance in `bucket`; buckets past the last are the last."""
        bucket = min(bucket, len(self._tried) - 1)
        return self._accepted[bucket] / self._tried[bucket]

    def observe(self, bucket: int, accepted: bool) -> None:
        bucket = min(bucket, len(self._tried) - 1)
        self._accepted[bucket] = self._accepted[bucket] * self._fade + accepted
        self._tried[bucket] = self._tried[bucket] * self._fade + 1.0


class Average:
    """A mean whose past fades; `weight` observations of `prior` to begin with."""

    def __init__(self, prior: float, weight: float, memory: float):
        self._sum, self._count, self._fade = prior * weight, weight, 1.0 - 1.0 / memory

    @property
    def value(self) -> float:
        return self._sum / self._count

    def observe(self, value: float, count: float = 1.0) -> None:
        """Adds `value`, a sum over `count` observations."""
        self._sum = self._sum * self._fade + value
        self._count = self._count * self._fade + count

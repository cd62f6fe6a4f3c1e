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


class PositionOdds:
    """The chance that draft j is accepted, given that all before it were.

    Positions that are not reached any more go back to what the plan knows of them, scaled by how the
    traffic compares with the plan at the positions that are: so a run of good luck is followed further.

    Args:
        plan: The plan's chances by position; those past the last are the last.
        positions: How many there may be.
    """

    def __init__(
        self, plan: Sequence[float], positions: int, weight: float = PRIOR_WEIGHT, memory: float = MEMORY
    ):
        self._plan = [*plan, *[plan[-1]] * positions][: max(positions, 1)]
        self._accepted, self._tried = [0.0] * len(self._plan), [0.0] * len(self._plan)
        self._weight, self._fade = weight, 1.0 - 1.0 / memory
        self._now: list[float] | None = list(self._plan)

    def __getitem__(self, position: int) -> float:
        if self._now is None:
            self._now = self._chances()
        return self._now[min(position, len(self._now) - 1)]

    def _chances(self) -> list[float]:
        expected = sum(t * p for t, p in zip(self._tried, self._plan, strict=True))
        scale = (sum(self._accepted) + self._weight) / (expected + self._weight)
        return [
            (a + self._weight * min(scale * p, 1.0)) / (t + self._weight)
            for a, t, p in zip(self._accepted, self._tried, self._plan, strict=True)
        ]

    def observe(self, accepted: int, tried: int) -> None:
        """Learns from a request whose first `accepted` of `tried` drafts were accepted."""
        if not tried:
            return
        for j in range(len(self._plan)):
            reached = j < tried and j <= accepted
            self._accepted[j] = self._accepted[j] * self._fade + (j < accepted)
            self._tried[j] = self._tried[j] * self._fade + reached
        self._now = None


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

"""FixedPolicy: what pacing is compared with, in the same engine."""

from __future__ import annotations

from collections.abc import Sequence

from sdfp_vllm.pacing.policy import DraftPolicy, Round, Row
from sdfp_vllm.pacing.record import confidence_bin


class FixedPolicy(DraftPolicy):
    """Drafts `count` tokens for every request in every round, with the model alone.

    Args:
        paced: The policy whose place it takes; it learns nothing meanwhile.
    """

    def __init__(self, paced: DraftPolicy, count: int):
        super().__init__(paced.costs.plan, paced.longest)
        self.paced, self._count = paced, count
        self.sights = None  # drafts see what they were set up to see

    def begin(self, rows: list[Row], context: float = 0.0, seen: float | None = None) -> Round:
        self.costs.at(len(rows), context, context if seen is None else seen)
        return FixedRound(self, rows, self._count)


class FixedRound(Round):
    """A round that goes on until all have their drafts, whatever they cost."""

    def __init__(self, policy: DraftPolicy, rows: list[Row], count: int):
        super().__init__(policy, rows)
        self._count = count
        for row in rows:
            row.copies, row.drafts, row.drafting = False, 0, row.kind is not None
        self._verified = self.batch

    def goes_on(self) -> bool:
        return self.steps < min(self._count, self._policy.longest) and any(
            r.drafting and r.drafts < r.most for r in self.rows
        )

    def saw(self, confidence: Sequence[float]) -> list[bool]:
        self.steps += 1
        kept = []
        for row, value in zip(self.rows, confidence, strict=True):
            keep = row.drafting and row.drafts < row.most
            if keep:
                row.drafts += 1
                row.bins.append(confidence_bin(value))
                self._verified += 1
            kept.append(keep)
        return kept

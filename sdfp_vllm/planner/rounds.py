"""From accepted runs at every position to the rounds that an engine takes over the same text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rounds:
    """What k draft tokens a round came to, over the rounds that decoding the text would take.

    Attributes:
        count: Rounds.
        tried: Per draft token, rounds in which all before it were accepted.
        accepted: Per draft token, rounds in which it was accepted too.
    """

    count: int
    tried: list[int]
    accepted: list[int]

    @property
    def acceptance(self) -> list[float]:
        """P(draft token j accepted | all before it accepted); 0 where no round came that far."""
        return [a / t if t else 0.0 for a, t in zip(self.accepted, self.tried, strict=True)]

    @property
    def standard_error(self) -> list[float]:
        """Binomial standard error of each `acceptance` (1 where no round came that far)."""
        return [
            (p * (1 - p) / t) ** 0.5 if t else 1.0 for p, t in zip(self.acceptance, self.tried, strict=True)
        ]

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, the engine's own figure."""
        drafted = self.count * len(self.tried)
        return sum(self.accepted) / drafted if drafted else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a round yields: accepted drafts and the target's own token."""
        return 1.0 + (sum(self.accepted) / self.count if self.count else 0.0)


@dataclass(frozen=True)
class AcceptedRuns:
    """For every start position, how many draft tokens in a row the target accepts.

    Attributes:
        lengths: int64 [N, S], at most `steps`; S start positions from `Continuations.first` on.
        ends: int64 [N], start positions of each sequence that lie within its text.
        steps: Draft steps that were run.
    """

    lengths: Tensor
    ends: Tensor
    steps: int

    def rounds(self, draft_tokens: int) -> Rounds:
        """Walks the text in rounds of `draft_tokens` drafts, each starting where the last one stopped.

        A round starts more often after a wrong draft than elsewhere, so the mean over all
        positions is not what the engine sees; the walk visits the engine's own positions.
        """
        tried, accepted, count = [0] * draft_tokens, [0] * draft_tokens, 0
        for lengths, end in zip(self.lengths.tolist(), self.ends.tolist(), strict=True):
            start = 0
            while start + draft_tokens <= end:
                run = min(lengths[start], draft_tokens)
                count += 1
                for j in range(draft_tokens):
                    tried[j] += run >= j
                    accepted[j] += run > j
                start += run + 1
        return Rounds(count, tried, accepted)

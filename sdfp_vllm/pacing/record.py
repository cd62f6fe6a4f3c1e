"""Pacing: what a plan knows about the cost and the luck of drafts, for the engine to pace them by."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdfp_vllm.common.interpolate import at_rows, fastest_rows

# Confidence is the draft's largest probability. Narrow bins at the top, where most drafts are.
CONFIDENCE_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)

Milliseconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


def confidence_bin(confidence: float) -> int:
    """Bin of a probability: 0 below the first edge, len(CONFIDENCE_EDGES) from the last on."""
    return bisect_right(CONFIDENCE_EDGES, confidence)


class Pacing(BaseModel):
    """Times and chances of acceptance for one keep set, as measured by the offline job.

    Attributes:
        rows: Row counts of a forward, ascending from 1.
        target_ms: The full model's forward over that many rows (head included), milliseconds.
        draft_ms: One draft step over that many rows (kept layers and head), milliseconds.
        draft_overhead_ms, round_overhead_ms: What the engine adds to a draft step, and to every round, drafting or not.
        acceptance: Chance that draft token j is accepted, given that all before it were.
        confidence: Per bin of CONFIDENCE_EDGES, the chance that a draft of such confidence is accepted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: list[Annotated[int, Field(ge=1, strict=True)]] = Field(min_length=1)
    target_ms: list[Milliseconds]
    draft_ms: list[Milliseconds]
    draft_overhead_ms: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    round_overhead_ms: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    acceptance: list[Probability] = Field(min_length=1)
    confidence: list[Probability] = Field(
        min_length=len(CONFIDENCE_EDGES) + 1, max_length=len(CONFIDENCE_EDGES) + 1
    )

    @model_validator(mode="after")
    def _columns_match(self) -> Pacing:
        if self.rows[0] != 1 or self.rows != sorted(set(self.rows)):
            raise ValueError("rows must ascend from 1")
        if not len(self.rows) == len(self.target_ms) == len(self.draft_ms):
            raise ValueError("target_ms and draft_ms need one entry for each of rows")
        return self

    def verify_ms(self, rows: int) -> float:
        """The full model over `rows` rows; linear between and beyond the measured ones."""
        return at_rows(self.rows, self.target_ms, rows)

    def step_rows(self, batch: int) -> int:
        """Rows that a draft step for `batch` requests is run with, padding included."""
        return fastest_rows(self.rows, self._draft_ms, batch)

    def padded_batches(self) -> list[int]:
        """`step_rows` of 1, 2, ... requests, up to the last batch size that is padded."""
        found = [self.step_rows(batch) for batch in range(1, max(self.rows))]
        while found and found[-1] == len(found):
            found.pop()
        return found

    def step_ms(self, batch: int) -> float:
        """One draft step for `batch` requests."""
        return self._draft_ms(self.step_rows(batch)) + self.draft_overhead_ms

    def _draft_ms(self, rows: int) -> float:
        return at_rows(self.rows, self.draft_ms, rows)

    def plain_ms(self, batch: int) -> float:
        """One step of plain decoding."""
        return self.verify_ms(batch) + self.round_overhead_ms

    def plain_rate(self, batch: int) -> float:
        """Tokens per millisecond of plain decoding, all requests together."""
        return batch / self.plain_ms(batch)

    def least_ms(self, rounds: Iterable[tuple[int, int, int, int]]) -> float:
        """What rounds would take were everything free but the model: (batch size, rows verified, draft steps, count) each."""
        return sum(
            count * (self.verify_ms(rows) + steps * self._draft_ms(self.step_rows(batch)))
            for batch, rows, steps, count in rounds
        )

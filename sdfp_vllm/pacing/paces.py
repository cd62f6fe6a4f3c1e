"""Paces: how far each request is ahead of its batch.

A round is as long for those who gain nothing by it as for those who do. What users see is the time per token of their own
request, so the one that is behind comes first (`Row.worth`); to know who that is, tokens a round are counted by request.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdfp_vllm.pacing.odds import Average

_MEMORY = 16.0  # rounds


class Paces:
    """Tokens a round of late, by request."""

    def __init__(self) -> None:
        self._tokens: dict[str, Average] = {}

    def ahead(self, requests: Sequence[str]) -> list[float]:
        """Tokens a round of each of a batch's requests, over the mean of all. New ones stand at the mean, others are forgotten."""
        known = [self._tokens[r].value for r in requests if r in self._tokens]
        mean = sum(known) / len(known) if known else 1.0
        new = {r: Average(mean, _MEMORY / 2, _MEMORY) for r in requests if r not in self._tokens}
        self._tokens = {r: new.get(r) or self._tokens[r] for r in requests}
        values = [self._tokens[r].value for r in requests]
        return [v * len(values) / sum(values) for v in values]

    def observe(self, request: str, tokens: int) -> None:
        """Counts the tokens that a request got in a round."""
        if request in self._tokens:
            self._tokens[request].observe(tokens)

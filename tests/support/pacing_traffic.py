"""Costs, drafts and rounds that the tests of pacing share."""

from __future__ import annotations

import random
from collections.abc import Callable

from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Round, Row
from sdfp_vllm.pacing.record import CONFIDENCE_EDGES, Pacing

BINS = len(CONFIDENCE_EDGES) + 1


def costs(**changes) -> Pacing:
    """A target of 10 ms a step whose rows cost 0.5 ms each, and a draft of a fifth of it."""
    rows = [1, 64]
    fields = dict(
        rows=rows,
        target_ms=[10.0 + 0.5 * (m - 1) for m in rows],
        draft_ms=[2.0 + 0.1 * (m - 1) for m in rows],
        draft_overhead_ms=0.0,
        round_overhead_ms=0.5,
        acceptance=[0.8] * 8,
        confidence=[0.8] * BINS,
    )
    return Pacing.model_validate(fields | changes)


# (confidence, whether the draft is right) of one draft
Draft = Callable[[random.Random], tuple[float, bool]]


def simulate(
    policy: DraftPolicy, draft: Draft, rounds: int, batch: int = 1, seed: int = 0
) -> tuple[float, float, list[Round]]:
    """Runs rounds whose drafts come from `draft`; returns (tokens, milliseconds, rounds)."""
    rng = random.Random(seed)
    tokens, ms, done = 0.0, 0.0, []
    for _ in range(rounds):
        rows = [Row(GREEDY) for _ in range(batch)]
        round = policy.begin(rows)
        right: list[list[bool]] = [[] for _ in rows]
        while round.goes_on():
            drawn = [draft(rng) for _ in rows]
            kept = round.saw([confidence for confidence, _ in drawn])
            for seen, (_, ok), keep in zip(right, drawn, kept, strict=True):
                if keep:
                    seen.append(ok)
        accepted = [next((j for j, ok in enumerate(seen) if not ok), len(seen)) for seen in right]
        policy.settle(round, accepted, [len(seen) for seen in right])
        tokens += batch + sum(accepted)
        ms += round.ms
        done.append(round)
    return tokens, ms, done


def steady(chance: float) -> Draft:
    return lambda rng: (0.85, rng.random() < chance)

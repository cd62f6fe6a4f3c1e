"""From measured turns to rows: ratios to plain vLLM in the same turns, with their spread and what was accepted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdfp_vllm.demo.methods import ALONE, PLAIN, SDFP
from sdfp_vllm.measure.spec import Measurement, TurnMeasurement
from sdfp_vllm.pacing.record import Pacing
from sdfp_vllm.plan.schema import SkipPlan

Pair = tuple[TurnMeasurement, TurnMeasurement]  # a method's turn, and plain vLLM's on the same prompts


def row(name: str, pairs: Sequence[Pair], pacing: Pacing | None = None) -> dict[str, Any]:
    """One method's figures. Speeds are of decoding: tokens a second after each request's first.

    Args:
        pacing: The plan's, for `efficiency`: the least time that the rounds' own work takes at the plan's costs,
            over the time they took.
    """
    ours, plain = [a for a, _ in pairs], [b for _, b in pairs]
    ratios = [rate([a]) / rate([b]) for a, b in pairs]
    drafted, accepted = sum(t.draft_tokens for t in ours), sum(t.accepted_tokens for t in ours)
    rounds = sum(t.rounds for t in ours)
    positions = max((len(t.accepted_per_position) for t in ours), default=0)
    least = sum(pacing.least_ms(t.paced) for t in ours) if pacing else None
    return {
        "method": name,
        "turns": len(pairs),
        "tokens_per_second": rate(ours),
        "ratio": rate(ours) / rate(plain),
        "ratio_median": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "acceptance_rate": accepted / drafted if drafted else None,
        "tokens_per_round": 1 + accepted / rounds if rounds else None,
        "acceptance_by_position": [
            sum(t.accepted_per_position[j] for t in ours if j < len(t.accepted_per_position)) / rounds
            for j in range(positions)
        ]
        if rounds
        else [],
        "efficiency": least / 1e3 / sum(t.decode_seconds for t in ours) if least else None,
        "identical_texts": sum(
            x == y for a, b in pairs for x, y in zip(a.token_ids, b.token_ids, strict=True)
        ),
        "texts": sum(len(a.token_ids) for a in ours),
    }


def rate(turns: Sequence[TurnMeasurement]) -> float:
    """Tokens a second after each request's first."""
    tokens = sum(len(ids) - 1 for t in turns for ids in t.token_ids)
    return tokens / sum(t.decode_seconds for t in turns)


def variants(
    measured: Mapping[str, Measurement],
) -> Iterator[tuple[str, list[TurnMeasurement]]]:
    """Each method's turns; SDFP's alternate between drafts of the model alone and those with copies."""
    for method, m in measured.items():
        if method == SDFP:
            yield ALONE, m.turns[0::2]
            yield SDFP, m.turns[1::2]
        else:
            yield method, m.turns


def overall(measured: Mapping[str, Measurement], plan: SkipPlan | None) -> list[dict[str, Any]]:
    """One row for each method, over all questions. `measured` holds plain decoding."""
    plain, pacing = measured[PLAIN].turns, plan.pacing if plan else None
    return [
        row(name, list(zip(turns, plain, strict=True)), pacing if name in (ALONE, SDFP) else None)
        | {"extra_bytes": plan.extra_bytes if plan and name in (ALONE, SDFP) else 0}
        for name, turns in variants(measured)
    ]


def by_kind(kinds: Sequence[str], measured: Mapping[str, Measurement]) -> dict[str, list[dict[str, Any]]]:
    """The same rows for each kind of question.

    Args:
        kinds: Of the questions, in the order they were asked.
    """
    plain = measured[PLAIN].turns
    return {
        kind: [
            row(name, [(turns[i], plain[i]) for i, k in enumerate(kinds) if k == kind])
            for name, turns in variants(measured)
        ]
        for kind in dict.fromkeys(kinds)
    }

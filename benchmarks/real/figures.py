"""From measured turns to rows: ratios to plain vLLM in the same turns, with their spread and what was accepted."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from sdfp_vllm.measure import EngineSpec, Measurement, TurnMeasurement
from sdfp_vllm.plan.schema import SkipPlan


def rows_of(
    specs: Mapping[str, EngineSpec],
    measured: Mapping[str, list[tuple[Measurement, Measurement]]],
    plan: SkipPlan,
) -> list[dict[str, Any]]:
    """One row for each method, batch size and temperature; plain vLLM's repeats in other groups are pooled."""
    rows = []
    for method, runs in measured.items():
        spec = specs[method]
        for name, start, step in _variants(method):
            for batch, temperature in dict.fromkeys((t.batch, t.temperature) for t in spec.turns):
                pairs = [
                    (ours.turns[start + step * i], plain.turns[i])
                    for ours, plain in runs
                    for i, turn in enumerate(spec.turns[start::step])
                    if (turn.batch, turn.temperature) == (batch, temperature)
                ]
                rows.append(_row(name, batch, temperature, pairs, plan if method == "sdfp" else None))
    return rows


def _variants(method: str) -> list[tuple[str, int, int]]:
    """(name, first turn, step between turns): SDFP's turns alternate."""
    return [("sdfp, no copies", 0, 2), ("sdfp", 1, 2)] if method == "sdfp" else [(method, 0, 1)]


def _row(
    name: str,
    batch: int,
    temperature: float,
    pairs: Sequence[tuple[TurnMeasurement, TurnMeasurement]],
    plan: SkipPlan | None,
) -> dict[str, Any]:
    ours, plain = [a for a, _ in pairs], [b for _, b in pairs]
    ratios = [_rate([a]) / _rate([b]) for a, b in pairs]
    drafted, accepted = sum(t.draft_tokens for t in ours), sum(t.accepted_tokens for t in ours)
    rounds = sum(t.rounds for t in ours)
    positions = max((len(t.accepted_per_position) for t in ours), default=0)
    same = sum(x == y for a, b in pairs for x, y in zip(a.token_ids, b.token_ids, strict=True))
    pacing = plan.pacing if plan else None
    least = sum(pacing.least_ms(t.paced) for t in ours) if pacing else None
    return {
        "method": name,
        "batch": batch,
        "temperature": temperature,
        "turns": len(pairs),
        "tokens_per_second": _rate(ours),
        "ratio": _rate(ours) / _rate(plain),
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
        "identical_texts": None if temperature else same,
        "texts": sum(len(a.token_ids) for a in ours),
    }


def _rate(turns: Sequence[TurnMeasurement]) -> float:
    """Tokens a second after each request's first."""
    tokens = sum(len(ids) - 1 for t in turns for ids in t.token_ids)
    return tokens / sum(t.decode_seconds for t in turns)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    made = Table(
        "method",
        "batch",
        "T",
        "tokens/s",
        "ratio",
        "least-most",
        "accepted",
        "a round",
        "efficiency",
        "identical",
    )
    for r in rows:
        made.add_row(
            r["method"],
            str(r["batch"]),
            f"{r['temperature']:g}",
            f"{r['tokens_per_second']:.2f}",
            f"{r['ratio']:.2f}x",
            f"{r['ratio_least']:.2f}-{r['ratio_most']:.2f}",
            "-" if r["acceptance_rate"] is None else f"{r['acceptance_rate']:.3f}",
            "-" if r["tokens_per_round"] is None else f"{r['tokens_per_round']:.2f}",
            "-" if r["efficiency"] is None else f"{r['efficiency']:.2f}",
            "-" if r["identical_texts"] is None else f"{r['identical_texts']} of {r['texts']}",
        )
    return made

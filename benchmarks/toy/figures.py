"""From measured turns to the suite's rows: ratios with their spread, acceptance, the bound, efficiency."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.toy.engines import DRAFT_MODEL, DRAFT_MODEL_TOKENS, FIXED, NGRAM, PLAIN, SDFP, SUFFIX
from benchmarks.toy.workloads import CODE, Cell
from sdfp_vllm.measure.spec import TurnMeasurement
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.schema import SkipPlan

# (the turn, its batch size) -> the least milliseconds its decoding could take
Least = Callable[[TurnMeasurement, int], float | None]


def least_time(method: str, plan: SkipPlan, draft: Costs | None) -> Least:
    """The time of the model's own work in `method`'s rounds at the costs measured beforehand, all else free."""
    pacing = plan.pacing
    assert pacing is not None

    def plain(turn: TurnMeasurement, batch: int) -> float:
        groups = len(turn.token_ids) / batch
        return groups * (len(turn.token_ids[0]) - 1) * pacing.verify_ms(batch)

    def rounds(turn: TurnMeasurement, batch: int, step_ms: float, steps: float) -> float | None:
        """`turn.rounds` counts a round once for each request; requests of a batch verify together."""
        if not turn.rounds:
            return None
        drafts = turn.draft_tokens / turn.rounds
        together = turn.rounds / batch
        later = sum(len(ids) - 1 for ids in turn.token_ids)
        undrafted = max(0.0, later - turn.rounds - turn.accepted_tokens) / batch
        verify = pacing.verify_ms(round(batch * (1 + drafts)))
        return together * (verify + steps * step_ms) + undrafted * pacing.verify_ms(batch)

    def paced(turn: TurnMeasurement, batch: int) -> float | None:
        return pacing.least_ms(turn.paced) if turn.paced else None

    def fixed(turn: TurnMeasurement, batch: int) -> float | None:
        k = plan.num_speculative_tokens
        return rounds(turn, batch, pacing.step_ms(batch) - pacing.draft_overhead_ms, k)

    def separate(turn: TurnMeasurement, batch: int) -> float | None:
        if draft is None:
            return None
        return rounds(turn, batch, draft.target_ms(batch), DRAFT_MODEL_TOKENS)

    def looked_up(turn: TurnMeasurement, batch: int) -> float | None:
        return rounds(turn, batch, 0.0, 0.0)

    return {
        PLAIN: plain, SDFP: paced, FIXED: fixed, DRAFT_MODEL: separate, NGRAM: looked_up, SUFFIX: looked_up,
    }[method]  # fmt: skip


def decode_rate(turn: TurnMeasurement) -> float:
    """Tokens a second after each request's first."""
    return sum(len(ids) - 1 for ids in turn.token_ids) / turn.decode_seconds


def row(
    cell: Cell,
    method: str,
    turns: Sequence[TurnMeasurement],
    plain: Sequence[TurnMeasurement],
    least: Least,
    plain_least: Least,
) -> dict[str, Any]:
    """One method in one cell, over the repeats. `turns[i]` and `plain[i]` are of the same prompts."""
    ratios = [decode_rate(a) / decode_rate(b) for a, b in zip(turns, plain, strict=True)]
    whole = [b.seconds / a.seconds for a, b in zip(turns, plain, strict=True)]
    bounds = []
    for turn in turns:
        own, other = least(turn, cell.batch), plain_least(turn, cell.batch)
        if own and other:
            bounds.append(other / own)
    drafted, accepted = sum(t.draft_tokens for t in turns), sum(t.accepted_tokens for t in turns)
    rounds = sum(t.rounds for t in turns)
    positions = max((len(t.accepted_per_position) for t in turns), default=0)
    spent = sum(t.decode_seconds for t in turns)
    ratio = statistics.median(ratios)
    bound = statistics.median(bounds) if bounds else None
    same = sum(
        a == b
        for t, p in zip(turns, plain, strict=True)
        for a, b in zip(t.token_ids, p.token_ids, strict=True)
    )
    return {
        "kind": cell.kind,
        "batch": cell.batch,
        "temperature": cell.temperature,
        "method": method,
        "repeats": len(turns),
        "ratio": ratio,
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "ratio_with_prefill": statistics.median(whole),
        "decode_tokens_per_second": statistics.median(map(decode_rate, turns)),
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_by_position": [
            sum(t.accepted_per_position[j] for t in turns if j < len(t.accepted_per_position)) / rounds
            for j in range(positions)
        ]
        if rounds
        else [],
        "tokens_per_round": 1 + accepted / rounds if rounds else None,
        "draft_share": sum(t.draft_seconds for t in turns) / spent,
        "bound": bound,
        "efficiency": ratio / bound if bound else None,
        "identical_texts": None if cell.temperature else same,
        "texts": sum(len(t.token_ids) for t in turns),
    }


def headline(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The figures that the project is held to; on the demo target, code completion unless said otherwise."""

    def find(field: str, kind: str = CODE, batch: int = 1, sampled: bool = False) -> float | None:
        return next(
            (
                r[field]
                for r in rows
                if r["method"] == SDFP
                and (r["kind"], r["batch"], r["temperature"] > 0) == (kind, batch, sampled)
            ),
            None,
        )

    ours = [r for r in rows if r["method"] == SDFP]
    return {
        "speedup_batch1_greedy": find("ratio"),
        "speedup_batch1_sampling": find("ratio", sampled=True),
        "efficiency_batch1": find("efficiency"),
        "efficiency_batch8": find("efficiency", batch=8),
        "worst_case_ratio": min(r["ratio"] for r in ours) if ours else None,
    }

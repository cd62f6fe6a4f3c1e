"""From scores, acceptance and cost to the plan's keep set and draft length. No number is set by hand.

Keep sets are nested: the n layers with the highest FIT score (SDFP, arXiv 2602.05499), for n from
one up. Each is rolled out on the target's own text, and the (keep set, draft length) with the
highest predicted tokens per second wins:

    speedup(n, k) = E[tokens a round] * plain_ms / (k * draft_ms(n) + verify_ms(k + 1) + overheads)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.fit.cost import MeasuredCost
from sdfp_vllm.fit.rollout import DraftRollout
from sdfp_vllm.fit.rounds import AcceptedRuns
from sdfp_vllm.plan import MAX_DRAFT_TOKENS, Candidate, LayerScore, Prediction

# A first or last layer gives up its place only with less than this share of the median score.
WIDE_MARGIN = 0.01
# Below this a predicted gain is within the prediction's own error.
WORTHWHILE = 1.02
MAX_SIZES = 16
MAX_TRIED = 8  # draft tokens a round, unless the user fixes the number
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Choice:
    """What the search found.

    Attributes:
        kept_layers, draft_tokens: The best keep set and its draft length (at least 1).
        prediction: What they are predicted to give at batch 1.
        worthwhile: Whether that beats plain decoding by more than the prediction's error.
        curve: Every keep set that was rolled out, by size.
        by_batch: (batch size, best draft length), the length 0 where plain decoding is faster.
    """

    kept_layers: list[int]
    draft_tokens: int
    prediction: Prediction
    worthwhile: bool
    curve: list[Candidate]
    by_batch: list[tuple[int, int]]


def ranked_layers(scores: Sequence[LayerScore], form: str = "trace") -> list[int]:
    """Layers by how much they matter, most important first; keep sets are its prefixes.

    The first and the last layer lead whatever their rank, since they map from and to token space
    and single-layer scores do not see that; unless one scores below WIDE_MARGIN of the median.

    Args:
        form: "trace" (trace x variance) or "diagonal".
    """
    if form not in ("trace", "diagonal"):
        raise SdfpError("--score-form", f"{form!r} is no score form", "Use trace or diagonal.")
    value = {s.layer: getattr(s.total, f"{form}_score") for s in scores}
    margin = WIDE_MARGIN * statistics.median(value.values())
    ends = {i for i in (0, len(scores) - 1) if value[i] >= margin}
    return sorted(value, key=lambda i: (i not in ends, -value[i], i))


def candidate_sizes(num_layers: int, most: int = MAX_SIZES) -> list[int]:
    """Keep-set sizes to try, 1 to num_layers - 1; in deep models thinned out towards the large ones."""
    last = num_layers - 1
    if last <= most:
        return list(range(1, num_layers))
    dense = most // 2
    ratio = (last / dense) ** (1 / (most - dense))
    return sorted({*range(1, dense + 1), *(round(dense * ratio**i) for i in range(1, most - dense + 1))})


def search(
    rollout: DraftRollout,
    scores: Sequence[LayerScore],
    cost: MeasuredCost,
    *,
    form: str = "trace",
    layers: int | None = None,
    draft_tokens: int | None = None,
    advance: Callable[[str], None] | None = None,
) -> Choice:
    """Rolls out the keep sets that could win and returns the best.

    A keep set is not rolled out, or no further, where even full acceptance of the steps to come
    would not beat the best so far: such sets are missing, or short, in the curve.

    Args:
        layers: Fixes the number of kept layers.
        draft_tokens: Fixes the draft length.
        advance: Called with a line of news after each keep set.

    Raises:
        SdfpError: If `layers` or `draft_tokens` is out of range, or the model has one layer.
    """
    choice = search_above(
        0.0, rollout, scores, cost, form=form, layers=layers, draft_tokens=draft_tokens, advance=advance
    )
    assert choice is not None  # the first keep set is always rolled out
    return choice


def search_above(
    beat: float,
    rollout: DraftRollout,
    scores: Sequence[LayerScore],
    cost: MeasuredCost,
    *,
    form: str = "trace",
    layers: int | None = None,
    draft_tokens: int | None = None,
    advance: Callable[[str], None] | None = None,
) -> Choice | None:
    """Like `search`, but rolls out only what could exceed a speedup of `beat`; None if nothing does."""
    check_request(len(scores), layers, draft_tokens)
    sizes = candidate_sizes(len(scores)) if layers is None else [layers]
    lengths = list(range(1, MAX_TRIED + 1)) if draft_tokens is None else [draft_tokens]
    ranking = ranked_layers(scores, form)
    curve: list[Candidate] = []
    best: tuple[float, list[int], int, AcceptedRuns] | None = None
    for size in sizes:
        keep = sorted(ranking[:size])
        bar = best[0] if best else beat
        if max(cost.speedup(size, k, k + 1) for k in lengths) > bar:
            runs = rollout.run(keep, lengths[-1], proceed=_could_win(cost, size, lengths, bar))
            candidate = _candidate(keep, runs, cost)
            curve.append(candidate)
            for k in lengths:
                if k <= runs.steps and candidate.speedup[k] > (best[0] if best else beat):
                    best = (candidate.speedup[k], keep, k, runs)
        if advance and best:
            advance(f"{len(best[1])} layers x {best[2]} tokens: {best[0]:.2f}x")
    if best is None:
        return None
    speedup, keep, k, runs = best
    rounds = runs.rounds(k)
    return Choice(
        kept_layers=keep,
        draft_tokens=k,
        prediction=Prediction(
            acceptance_rate=rounds.acceptance_rate,
            mean_accepted_length=rounds.mean_accepted_length,
            speedup=speedup,
        ),
        worthwhile=speedup > WORTHWHILE,
        curve=curve,
        by_batch=[] if draft_tokens else _by_batch(len(keep), k, runs, cost),
    )


def check_request(num_layers: int, layers: int | None, draft_tokens: int | None) -> None:
    """Refuses what no search can meet; needs no weights.

    Raises:
        SdfpError: If `layers` or `draft_tokens` is out of range, or the model has one layer.
    """
    if num_layers < 2:
        raise SdfpError("model", "has a single decoder layer, none can be skipped", "Serve it without SDFP.")
    if layers is not None and not 1 <= layers < num_layers:
        raise SdfpError("--layers", f"{layers} of {num_layers} layers", f"Keep 1 to {num_layers - 1} layers.")
    if draft_tokens is not None and not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
        raise SdfpError("--draft-tokens", f"{draft_tokens} a round", f"Draft 1 to {MAX_DRAFT_TOKENS} tokens.")


def _could_win(
    cost: MeasuredCost, size: int, lengths: list[int], bar: float
) -> Callable[[AcceptedRuns], bool]:
    """Whether drafts longer than those run so far could still beat `bar`, were all of them accepted."""

    def proceed(runs: AcceptedRuns) -> bool:
        done = runs.rounds(runs.steps)
        known = done.mean_accepted_length
        reached = done.accepted[-1] / done.count if done.count else 0.0
        own = max(
            (cost.speedup(size, k, runs.rounds(k).mean_accepted_length) for k in lengths if k <= runs.steps),
            default=0.0,
        )
        return any(
            cost.speedup(size, k, known + (k - runs.steps) * reached) > max(bar, own)
            for k in lengths
            if k > runs.steps
        )

    return proceed


def _candidate(keep: list[int], runs: AcceptedRuns, cost: MeasuredCost) -> Candidate:
    lengths = [runs.rounds(k).mean_accepted_length for k in range(1, runs.steps + 1)]
    return Candidate(
        kept_layers=keep,
        acceptance=runs.rounds(runs.steps).acceptance,
        speedup=[1.0, *(cost.speedup(len(keep), k, length) for k, length in enumerate(lengths, 1))],
    )


def _by_batch(size: int, longest: int, runs: AcceptedRuns, cost: MeasuredCost) -> list[tuple[int, int]]:
    """Every row of a batch costs verification, so drafts shorten as it grows; never above `longest`."""
    tokens = [1.0] + [runs.rounds(k).mean_accepted_length for k in range(1, longest + 1)]
    table: list[tuple[int, int]] = []
    for batch in BATCH_SIZES:
        gain = [cost.speedup(size, k, tokens[k], batch) for k in range(longest + 1)]
        table.append((batch, max(range(longest + 1), key=gain.__getitem__)))
    return table

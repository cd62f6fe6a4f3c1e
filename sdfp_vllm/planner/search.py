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
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import MAX_DRAFT_TOKENS, Candidate, LayerScore, Prediction
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.rollout import DraftRollout
from sdfp_vllm.planner.rounds import AcceptedRuns

# A first or last layer gives up its place only with less than this share of the median score.
WIDE_MARGIN = 0.01
# Below this a predicted gain is within the prediction's own error.
WORTHWHILE = 1.02
MAX_SIZES = 16
MAX_TRIED = 8  # draft tokens a round, unless the user fixes the number
LUCK = 0.015  # by which a smaller view may be accepted more often than a larger one, on little text
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Choice:
    """What the search found.

    Attributes:
        keep, draft_tokens: The best keep set and its draft length (at least 1).
        runs: What the best keep set's rollout came to.
        prediction: What they are predicted to give at batch 1.
        worthwhile: Whether that beats plain decoding by more than the prediction's error.
        curve: Every keep set that was rolled out, by size.
        by_batch: (batch size, best draft length), the length 0 where plain decoding is faster.
    """

    keep: KeepSet
    draft_tokens: int
    runs: AcceptedRuns
    prediction: Prediction
    worthwhile: bool
    curve: list[Candidate]
    by_batch: list[tuple[int, int]]

    @property
    def kept_layers(self) -> list[int]:
        """Layers that are kept whole."""
        return list(self.keep.layers)


@dataclass(frozen=True)
class Trial:
    """A keep set, what its rollout came to, and the draft length that is fastest with it."""

    keep: KeepSet
    runs: AcceptedRuns
    draft_tokens: int
    speedup: float


def best_trial(keep: KeepSet, runs: AcceptedRuns, cost: Costs, lengths: Sequence[int]) -> Trial:
    """Judges a rollout at each of `lengths` that it reached (the first of them always)."""
    reached = [k for k in lengths if k <= runs.steps]
    gains = {k: cost.speedup(keep, k, runs.rounds(k).mean_accepted_length) for k in reached}
    k = max(reached, key=gains.__getitem__)
    return Trial(keep, runs, k, gains[k])


def draft_lengths(draft_tokens: int | None) -> list[int]:
    """Draft lengths to try: the one asked for, or 1 to MAX_TRIED."""
    return list(range(1, MAX_TRIED + 1)) if draft_tokens is None else [draft_tokens]


def ranked_layers(scores: Sequence[LayerScore], form: str = "trace") -> list[int]:
    """Layers by how much they matter, most important first; keep sets are its prefixes.

    The first and the last layer lead whatever their rank, since they map from and to token space
    and single-layer scores do not see that; unless one scores below WIDE_MARGIN of the median.

    Args:
        form: "trace" (trace x variance) or "diagonal".
    """
    ends = leading_ends(scores, form)
    value = {s.layer: getattr(s.total, f"{form}_score") for s in scores}
    return sorted(value, key=lambda i: (i not in ends, -value[i], i))


def leading_ends(scores: Sequence[LayerScore], form: str) -> set[int]:
    """Those of the first and the last layer that do not score far below the others."""
    if form not in ("trace", "diagonal"):
        raise SdfpError("--score-form", f"{form!r} is no score form", "Use trace or diagonal.")
    value = [getattr(s.total, f"{form}_score") for s in scores]
    margin = WIDE_MARGIN * statistics.median(value)
    return {i for i in (0, len(scores) - 1) if value[i] >= margin}


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
    cost: Costs,
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
    cost: Costs,
    *,
    form: str = "trace",
    layers: int | None = None,
    draft_tokens: int | None = None,
    advance: Callable[[str], None] | None = None,
) -> Choice | None:
    """Like `search`, but rolls out only what could exceed a speedup of `beat`; None if nothing does."""
    check_request(len(scores), layers, draft_tokens)
    family = fit_family(scores, form, sizes_asked(len(scores), layers))
    return search_family(beat, family, rollout, cost, draft_tokens=draft_tokens, advance=advance)


def sizes_asked(num_layers: int, layers: int | None) -> list[int]:
    """Numbers of layers to try: the one asked for, or those of `candidate_sizes`."""
    return candidate_sizes(num_layers) if layers is None else [layers]


def fit_family(scores: Sequence[LayerScore], form: str, sizes: Sequence[int]) -> list[list[int]]:
    """The layers that FIT keeps, for each of `sizes`."""
    ranking = ranked_layers(scores, form)
    return [sorted(ranking[:size]) for size in sizes]


def search_family(
    beat: float,
    family: Sequence[KeepSet | list[int]],
    rollout: DraftRollout,
    cost: Costs,
    *,
    draft_tokens: int | None = None,
    advance: Callable[[str], None] | None = None,
) -> Choice | None:
    """Rolls out those of `family` (keep sets, or lists of whole layers) that could exceed `beat`; the best, or None."""
    trials, curve = roll_out(beat, family, rollout, cost, draft_tokens=draft_tokens, advance=advance)
    best = max(trials, key=lambda t: t.speedup, default=None)
    return choice(best, curve, cost, draft_tokens) if best and best.speedup > beat else None


def roll_out(
    beat: float,
    family: Sequence[KeepSet | list[int]],
    rollout: DraftRollout,
    cost: Costs,
    *,
    draft_tokens: int | None = None,
    advance: Callable[[str], None] | None = None,
) -> tuple[list[Trial], list[Candidate]]:
    """Those of `family` that could exceed `beat` and all before them: rolled out as far as they could, and the curve.

    A keep set that fell behind before the shortest draft length is on the curve alone.
    """
    lengths = draft_lengths(draft_tokens)
    trials: list[Trial] = []
    curve: list[Candidate] = []
    best: Trial | None = None
    for asked in family:
        keep = KeepSet.of(asked)
        bar = max(beat, best.speedup) if best else beat
        if max(cost.speedup(keep, k, k + 1) for k in lengths) > bar:
            runs = rollout.run(asked, lengths[-1], proceed=could_win(cost, keep, lengths, bar))
            curve.append(candidate(keep, runs, cost))
            if runs.steps >= lengths[0]:
                trials.append(best_trial(keep, runs, cost, lengths))
                best = max(trials, key=lambda t: t.speedup)
        if advance and best:
            advance(f"{best.keep.size:g} layers x {best.draft_tokens} tokens: {best.speedup:.2f}x")
    return trials, curve


def roll_out_chains(
    chains: Sequence[Sequence[KeepSet]],
    rollout: DraftRollout,
    cost: Costs,
    *,
    draft_tokens: int | None = None,
    advance: Callable[[str], None] | None = None,
) -> tuple[list[Trial], list[Candidate]]:
    """As `roll_out`, over chains of views of which each has less than the one before.

    Less is accepted no more often, so what the last one came to bounds those behind it: one that would not be
    fastest even with that acceptance (and a little more, for luck) is left out.
    """
    trials: list[Trial] = []
    curve: list[Candidate] = []
    lengths, seen = draft_lengths(draft_tokens), set()
    for chain in chains:
        rates: list[float] = [1.0]
        for view in chain:
            bar = max((t.speedup for t in trials), default=0.0)
            if view in seen or _ceiling(view, rates, cost, lengths) <= bar:
                continue
            seen.add(view)
            tried, points = roll_out(bar, [view], rollout, cost, draft_tokens=draft_tokens)
            trials, curve = trials + tried, curve + points
            rates = points[0].acceptance if points else rates
            if advance:
                best = max(trials, key=lambda t: t.speedup)
                advance(f"{best.keep.size:g} layers x {best.draft_tokens} tokens: {best.speedup:.2f}x")
    return trials, curve


def _ceiling(view: KeepSet, rates: Sequence[float], cost: Costs, lengths: Sequence[int]) -> float:
    """The speedup of `view` if its drafts were accepted at `rates`, the last of them going on, and LUCK more."""
    reached, tokens, best = 1.0, 1.0, 0.0
    for k in range(1, max(lengths) + 1):
        reached *= min(1.0, rates[min(k, len(rates)) - 1] + LUCK)
        tokens += reached
        if k in lengths:
            best = max(best, cost.speedup(view, k, tokens))
    return best


def choice(best: Trial, curve: list[Candidate], cost: Costs, draft_tokens: int | None) -> Choice:
    """The search's result once `best` has won; `draft_tokens` as the user fixed it."""
    rounds = best.runs.rounds(best.draft_tokens)
    tokens = [1.0] + [best.runs.rounds(k).mean_accepted_length for k in range(1, best.draft_tokens + 1)]
    return Choice(
        keep=best.keep,
        draft_tokens=best.draft_tokens,
        runs=best.runs,
        prediction=Prediction(
            acceptance_rate=rounds.acceptance_rate,
            mean_accepted_length=rounds.mean_accepted_length,
            speedup=best.speedup,
        ),
        worthwhile=best.speedup > WORTHWHILE,
        curve=curve,
        by_batch=[] if draft_tokens else lengths_by_batch(best.keep, tokens, cost),
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


def could_win(cost: Costs, keep: KeepSet, lengths: list[int], bar: float) -> Callable[[AcceptedRuns], bool]:
    """Whether drafts longer than those run so far could still beat `bar`, were all of them accepted."""

    def proceed(runs: AcceptedRuns) -> bool:
        done = runs.rounds(runs.steps)
        known = done.mean_accepted_length
        reached = done.accepted[-1] / done.count if done.count else 0.0
        own = max(
            (cost.speedup(keep, k, runs.rounds(k).mean_accepted_length) for k in lengths if k <= runs.steps),
            default=0.0,
        )
        return any(
            cost.speedup(keep, k, known + (k - runs.steps) * reached) > max(bar, own)
            for k in lengths
            if k > runs.steps
        )

    return proceed


def candidate(keep: KeepSet, runs: AcceptedRuns, cost: Costs) -> Candidate:
    """A keep set's point on the plan's curve."""
    lengths = [runs.rounds(k).mean_accepted_length for k in range(1, runs.steps + 1)]
    return Candidate(
        attention=DraftView.of(keep).modes("attention", cost.num_layers),
        mlp=DraftView.of(keep).modes("mlp", cost.num_layers),
        acceptance=runs.rounds(runs.steps).acceptance,
        speedup=[1.0, *(cost.speedup(keep, k, length) for k, length in enumerate(lengths, 1))],
    )


def lengths_by_batch(view: KeepSet, tokens: Sequence[float], cost: Costs) -> list[tuple[int, int]]:
    """Every row of a batch costs verification, so drafts shorten as it grows; never above the best length.

    Args:
        tokens: That a round of 0, 1, ... drafts yields, up to the best length.
    """
    table: list[tuple[int, int]] = []
    for batch in BATCH_SIZES:
        gain = [cost.speedup(view, k, tokens[k], batch) for k in range(len(tokens))]
        table.append((batch, max(range(len(tokens)), key=gain.__getitem__)))
    return table

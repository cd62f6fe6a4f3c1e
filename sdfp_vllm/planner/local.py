"""`--selector auto`: a keep set improved by a short local search on predicted speed.

FIT scores each layer in the full model, one at a time, so it knows neither what the kept layers do
for each other nor that a branch may be had without its layer. Of the starts (`selectors.py`: FIT's keep sets
and evenly spaced ones) those that are not clearly behind on the judging text are run on held-out text
too, and the best on both is taken. From there on each round tries to drop, add or swap branches and layers:

1. One backward pass orders what could be added; every drop, shift and swap, and the best
   additions, are screened by the overlap of their first step with the full model (`first_step.py`).
2. The most promising are rolled out on the judging text, and if better there, on the held-out text. One is taken
   if its predicted speed is higher on each of the two, and on both together by more than the standard error of
   the difference. With none the search ends.

The plan's prediction is over both texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Candidate
from sdfp_vllm.plan.view import BRANCHES, DraftView, Mode, Precision, Unit
from sdfp_vllm.planner.first_step import FirstStep, gates_of
from sdfp_vllm.planner.memory import UNLIMITED, Memory
from sdfp_vllm.planner.moves import EVERYTHING, merged, retuned, shifts, units, with_, without
from sdfp_vllm.planner.rollout import DraftRollout
from sdfp_vllm.planner.rounds import AcceptedRuns
from sdfp_vllm.planner.search import (
    Choice,
    Trial,
    best_trial,
    candidate,
    choice,
    could_win,
    draft_lengths,
)

MAX_ROLLOUTS = 24  # on the judging text, those of FIT's search not counted
SCREENED = 24  # moves of a kind that are screened: those that FIT expects to cost least for what they save
SCREENED_TEXTS = 4  # attention goes text by text, so few whole texts are quicker than a little of each
_ADDED, _SWAPPED = 12, 12  # additions and swaps that are screened
_CONTENDERS = 3  # starts that are compared on held-out text as well
_TRIED = 4  # rolled out before a round gives up


@dataclass(frozen=True)
class LocalSearch:
    """What a local search works with.

    Attributes:
        judging, held: Rollouts on the text that moves are judged on, and on the text that confirms them.
        draft_tokens: Fixes the draft length.
        budget: Keep sets may cost at most what this many layers do; None for no bound.
        whole: Keep whole layers only.
        precisions: What a branch may run at.
        memory: What rounded copies may take.
        can_round: Which branches have rounded copies.
        worth: FIT's score of each choice for each branch, to screen the most promising moves only; None: all.
        advance: Called with a line of news after each rollout.
    """

    judging: DraftRollout
    held: DraftRollout
    cost: Costs
    draft_tokens: int | None = None
    budget: int | None = None
    whole: bool = False
    advance: Callable[[str], None] | None = None
    precisions: Sequence[Precision] = ("full",)
    memory: Memory = UNLIMITED
    worth: Mapping[tuple[Unit, Mode], float] | None = None
    can_round: Mapping[str, bool] = field(default_factory=lambda: EVERYTHING)

    def improve(self, starts: Sequence[Trial], curve: Sequence[Candidate] = ()) -> Choice:
        """The best keep set found from the best of `starts` on; `curve`, with the sets taken on the way."""
        lengths = draft_lengths(self.draft_tokens)
        screen = FirstStep(self.judging, SCREENED_TEXTS)
        now, held = self._start(starts)
        path = [(now, held)]
        tried, rollouts = {now.keep}, 0
        while rollouts < MAX_ROLLOUTS:
            moves = self._moves(now, screen, tried)
            for keep in moves[: min(_TRIED, MAX_ROLLOUTS - rollouts)]:
                tried.add(keep)
                rollouts += 1
                runs = self.judging.run(
                    keep, lengths[-1], proceed=could_win(self.cost, keep, lengths, now.speedup)
                )
                taken = None
                if runs.steps >= lengths[0]:
                    taken = self._judge(best_trial(keep, runs, self.cost, lengths), now, held)
                if self.advance:
                    self.advance(f"{now.keep.size:g} layers x {now.draft_tokens} tokens: {now.speedup:.2f}x")
                if taken:
                    now, held = taken
                    path.append(taken)
                    break
            else:
                break
        return self._result(curve, path)

    def _start(self, starts: Sequence[Trial]) -> tuple[Trial, AcceptedRuns]:
        """Of the starts that are not clearly behind on the judging text the best on both texts."""
        best, *others = sorted(starts, key=lambda t: -t.speedup)
        close = [best]
        for trial in others:
            gain, error = log_gain(trial, best, self.cost)
            if gain + error >= 0:
                close.append(trial)
        ran = [(trial, self._confirm(trial)) for trial in close[:_CONTENDERS]]
        return max(ran, key=lambda of: log_gain(_pooled(*of), _pooled(*ran[0]), self.cost)[0])

    def _judge(self, trial: Trial, now: Trial, held: AcceptedRuns) -> tuple[Trial, AcceptedRuns] | None:
        """`trial` with its runs on the held-out text, if it is better on each text and clearly so on both together."""
        if log_gain(trial, now, self.cost)[0] <= 0:
            return None
        confirmed = self._confirm(trial)
        on_held, _ = log_gain(_with(trial, confirmed), _with(now, held), self.cost)
        gain, error = log_gain(_pooled(trial, confirmed), _pooled(now, held), self.cost)
        return (trial, confirmed) if on_held > 0 and gain > error else None

    def _confirm(self, trial: Trial) -> AcceptedRuns:
        return self.held.run(trial.keep, trial.runs.steps)

    def _result(self, tried: Sequence[Candidate], path: Sequence[tuple[Trial, AcceptedRuns]]) -> Choice:
        lengths = draft_lengths(self.draft_tokens)
        both = [best_trial(t.keep, pooled(t.runs, h), self.cost, lengths) for t, h in path]
        seen = {t.keep for t in both}
        curve = [c for c in tried if c.view not in seen]
        curve += [candidate(t.keep, t.runs, self.cost) for t in both]
        curve.sort(key=lambda c: c.keep.size)
        return choice(both[-1], curve, self.cost, self.draft_tokens)

    # ------------------------------------------------------------ moves
    def _moves(self, now: Trial, screen: FirstStep, tried: set[KeepSet]) -> list[DraftView]:
        """Untried neighbours of `now` that the screen expects to be faster, the best first."""
        keep, n = now.keep, self.cost.num_layers
        screen.center(keep)
        drops = (without(keep, u) for u in units(keep, n, kept=True, whole=self.whole))
        fewer = self._promising(self._possible(drops, now), now)
        tuned = self._promising(self._possible(retuned(keep, self.precisions, self.can_round), now), now)
        more = self._additions(now, screen)
        moves = [m for m in [*fewer, *tuned, *more, *shifts(keep, n)] if self._admits(m)]
        moves += self._swaps(now, screen, fewer, more)
        expected = self._expected(now, screen)
        speed = {m: expected(m) for m in self._possible(moves, now) if m not in tried}
        return sorted((m for m in speed if speed[m] > now.speedup), key=lambda m: -speed[m])

    def _promising(self, moves: list[DraftView], now: Trial) -> list[DraftView]:
        """The SCREENED moves of which FIT expects the least harm for the time they save, or the most help for what they take."""
        if self.worth is None or len(moves) <= SCREENED:
            return moves
        before, took = self._harm(now.keep), self.cost.layers_ms(now.keep, 1)
        changes = {m: (self._harm(m) - before, took - self.cost.layers_ms(m, 1)) for m in moves}
        quicker = sorted((m for m in moves if changes[m][1] > 0), key=lambda m: changes[m][0] / changes[m][1])
        truer = sorted((m for m in moves if changes[m][1] < 0), key=lambda m: -changes[m][0] / changes[m][1])
        return quicker[:SCREENED] + truer[: SCREENED // 2]

    def _harm(self, view: KeepSet) -> float:
        """FIT's score of all that `view` leaves out and rounds."""
        assert self.worth is not None
        choices = {
            (b, i): c
            for b in BRANCHES
            for i, c in enumerate(DraftView.of(view).modes(b, self.cost.num_layers))
        }
        return sum(self.worth[unit, c] for unit, c in choices.items() if c != "full")

    def _swaps(
        self, now: Trial, screen: FirstStep, fewer: Sequence[DraftView], more: Sequence[DraftView]
    ) -> list[DraftView]:
        """One drop and one addition at once: those that promise most if what each does to the overlap adds up."""
        promise: dict[DraftView, float] = {}
        for add in more:
            for drop in fewer:
                both = merged(now.keep, drop, add)
                if self._admits(both):
                    promise[both] = screen.overlap(drop) + screen.overlap(add)
        return sorted(promise, key=lambda m: -promise[m])[:_SWAPPED]

    def _additions(self, now: Trial, screen: FirstStep) -> list[DraftView]:
        """With the branches or layers added that would lower the divergence the most."""
        n = self.cost.num_layers
        absent = list(units(now.keep, n, kept=False, whole=self.whole))
        if not any(self._could_win(with_(now.keep, u, self.can_round), now) for u in absent):
            return []
        _, slope = screen.divergence(gates_of(now.keep, n), range(0, len(screen.chunks), 2))
        absent.sort(key=lambda unit: sum(float(slope[i, BRANCHES.index(b)]) for b, i in unit))
        return [with_(now.keep, u, self.can_round) for u in absent[:_ADDED]]

    def _could_win(self, keep: KeepSet, now: Trial) -> bool:
        """Whether `keep` would be faster than `now` if every draft were accepted."""
        return max(self.cost.speedup(keep, k, k + 1) for k in draft_lengths(self.draft_tokens)) > now.speedup

    def _expected(self, now: Trial, screen: FirstStep) -> Callable[[KeepSet], float]:
        """The speed that the screen expects of a keep set, scaled by what it would expect of `now`."""
        lengths = draft_lengths(self.draft_tokens)
        tokens = now.runs.rounds(now.draft_tokens).mean_accepted_length
        scale = tokens / _expected_tokens(screen.overlap(now.keep), now.draft_tokens)

        def expected(keep: KeepSet) -> float:
            overlap = screen.overlap(keep)
            return max(self.cost.speedup(keep, k, scale * _expected_tokens(overlap, k)) for k in lengths)

        return expected

    def _is_target(self, view: DraftView) -> bool:
        return view.size == self.cost.num_layers and not view.rounded

    def _possible(self, keeps: Iterable[DraftView], now: Trial) -> list[DraftView]:
        """Those that are drafts and could beat `now`, each once."""
        return [
            k
            for k in dict.fromkeys(keeps)
            if (k.layers or k.attention) and not self._is_target(k) and self._could_win(k, now)
        ]

    def _admits(self, keep: KeepSet) -> bool:
        if not self.memory.admits(DraftView.of(keep)):
            return False
        if self.budget is None:
            return True
        whole = self.cost.layers_ms(KeepSet.of(range(self.budget)), 1)
        return self.cost.layers_ms(keep, 1) <= whole * (1 + 1e-9)


def log_gain(trial: Trial, now: Trial, cost: Costs) -> tuple[float, float]:
    """Log of the predicted speeds' ratio, and its standard error: a jackknife over the text's sequences.

    Both ran over the same text, so that most of its ups and downs cancel.
    """
    ours, theirs = (_tokens_and_rounds(t) for t in (trial, now))
    time = cost.round_ms(now.keep, now.draft_tokens) / cost.round_ms(trial.keep, trial.draft_tokens)

    def gain(of: Tensor) -> float:
        (a, b), (c, d) = (x[of].sum(0).tolist() for x in (ours, theirs))
        return math.log(a * d / (b * c) * time) if b and d else 0.0

    every = torch.arange(len(ours))
    n = len(every)
    left_out = [gain(every[every != i]) for i in range(n)] if n > 1 else [0.0]
    mean = sum(left_out) / len(left_out)
    error = math.sqrt((n - 1) / n * sum((x - mean) ** 2 for x in left_out))
    return gain(every), error


def pooled(a: AcceptedRuns, b: AcceptedRuns) -> AcceptedRuns:
    """Runs over two texts as those over one; of as many steps as both were run."""
    steps = min(a.steps, b.steps)
    lengths = torch.cat([a.lengths, b.lengths]).clamp(max=steps)
    return AcceptedRuns(lengths, torch.cat([a.ends, b.ends]), steps)


def _tokens_and_rounds(trial: Trial) -> Tensor:
    """float64 [N, 2]: by sequence, tokens that its rounds yield and the number of rounds."""
    rows = []
    for lengths, end in zip(trial.runs.lengths, trial.runs.ends, strict=True):
        alone = AcceptedRuns(lengths[None], end[None], trial.runs.steps).rounds(trial.draft_tokens)
        rows.append((alone.count + sum(alone.accepted), alone.count))
    return torch.tensor(rows, dtype=torch.float64)


def _with(trial: Trial, runs: AcceptedRuns) -> Trial:
    return Trial(trial.keep, runs, trial.draft_tokens, trial.speedup)


def _pooled(trial: Trial, held: AcceptedRuns) -> Trial:
    """The trial as of both texts."""
    return _with(trial, pooled(trial.runs, held))


def _expected_tokens(acceptance: float, draft_tokens: int) -> float:
    """Tokens a round if every draft is accepted with the same chance (Leviathan et al. 2023, eq. 1)."""
    return sum(acceptance**j for j in range(draft_tokens + 1))

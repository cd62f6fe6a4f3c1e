"""The search for the draft's head, after the search for the layers: restricted where that is predicted to pay.

A smaller head makes a draft step cheaper and some drafts wrong. What it does to acceptance is rolled out
on the text the keep sets were tried on, which no token was counted in; what it saves is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Candidate
from sdfp_vllm.plan.view import Precision
from sdfp_vllm.planner.bridged_search import BridgedChoice
from sdfp_vllm.planner.head import RolledHead, head_sizes, measure_heads
from sdfp_vllm.planner.rollout import DraftRollout
from sdfp_vllm.planner.search import Trial, best_trial, candidate, choice, could_win, draft_lengths
from sdfp_vllm.planner.stack import DecoderStack

# What a restricted head must add to the predicted speed: below it the gain is within the prediction's error.
MARGIN = 1.02
HeadRequest = str | int  # "auto", "full", or the number of tokens


@dataclass(frozen=True)
class HeadChoice:
    """The tokens chosen (None: all), their share of the target's text, at which precision, and the result with them."""

    found: BridgedChoice
    tokens: Tensor | None = None
    coverage: float = 1.0
    precision: Precision = "full"

    def rolled(self, stack: DecoderStack) -> RolledHead | None:
        """The head for a rollout; None where it is the target's own."""
        if self.tokens is None and self.precision == "full":
            return None
        return RolledHead(stack, self.tokens, self.precision)


@dataclass(frozen=True)
class _Option:
    """A keep set with a head, before its rollout: `estimate` is its speedup if the two err independently."""

    estimate: float
    candidate: Candidate
    tokens: Tensor
    coverage: float
    precision: Precision
    cost: Costs

    @property
    def keep(self) -> KeepSet:
        return self.candidate.view


def search_head(
    request: HeadRequest,
    found: BridgedChoice,
    rollout: DraftRollout,
    ranking: Callable[[], Tensor],
    vocab_size: int,
    *,
    draft_tokens: int | None = None,
    news: Callable[[str], None] = lambda line: None,
    precision: Precision = "full",
    admits: Callable[[KeepSet, int, Precision], bool] = lambda view, tokens, precision: True,
) -> HeadChoice:
    """Returns `found` with the head asked for.

    "auto" first asks what a head that costs nothing and loses nothing would bring; only where that is
    MARGIN and more are tokens counted and heads tried, best estimate first, until no estimate beats the
    best so far. A number is taken even where it is slower.

    Args:
        ranking: Counts: all ids, the most frequent first, int64 [V].
        draft_tokens: Fixes the draft length.
        news: Called with a line after each rollout.
        precision: Of the head over all tokens that `found` was searched with; heads over fewer are tried at it too.
        admits: Whether there is memory for a view and a head over so many tokens.

    Raises:
        SdfpError: If there is no memory for the number of tokens asked for.
    """
    best = HeadChoice(found, precision=precision)
    if request == "full":
        return best
    lengths = draft_lengths(draft_tokens)
    # Bridges exist for the chosen keep set alone.
    curve = [c for c in found.choice.curve if not found.fitted.runs or _is_chosen(c, found)]
    bar = 0.0
    sizes = [request] if isinstance(request, int) else head_sizes(vocab_size)
    if request == "auto":
        bar = found.judged * MARGIN
        free = found.cost.model_copy(update={"draft_head": [0.0] * len(found.cost.rows)})
        if not sizes or max(_estimate(c, free, lengths) for c in curve) <= bar:
            return best
    ranked = ranking()
    heads = [(n, p) for n in sizes for p in dict.fromkeys(("full", precision))]
    options = _options(found, curve, rollout, ranked, heads, lengths, precision)
    options = [o for o in options if admits(o.keep, len(o.tokens), o.precision)]
    if isinstance(request, int) and not options:
        raise SdfpError(
            f"--head {request}",
            "takes more than --extra-memory leaves",
            "Ask for fewer tokens, or allow more.",
        )
    for option in sorted(options, key=lambda o: -o.estimate):
        if option.estimate <= bar:
            break
        keep = option.keep
        runs = rollout.run(
            keep,
            lengths[-1],
            proceed=could_win(option.cost, keep, lengths, bar),
            bridges=found.fitted.bridges,
            head=RolledHead(rollout.stack, option.tokens, option.precision),
        )
        if runs.steps < lengths[0]:
            continue  # a length that the user fixed, and that could not win
        trial = best_trial(keep, runs, option.cost, lengths)
        if trial.speedup > bar:
            bar, best = trial.speedup, _chosen(found, option, trial, draft_tokens)
            news(f"{len(option.tokens)} tokens in {option.precision}: {trial.speedup:.2f}x")
    return best


def _options(
    found: BridgedChoice,
    curve: Sequence[Candidate],
    rollout: DraftRollout,
    ranking: Tensor,
    heads: Sequence[tuple[int, Precision]],
    lengths: list[int],
    precision: Precision,
) -> list[_Option]:
    vocab = len(ranking)
    whole: list[tuple[int, Precision]] = [(vocab, p) for p in dict.fromkeys(p for _, p in heads)]
    took = measure_heads(rollout.stack, ranking, [*whole, *heads])
    written = rollout.text.written().cpu()
    options = []
    for size, p in heads:
        tokens = ranking[:size].sort().values
        coverage = torch.isin(written, tokens).double().mean().item()
        share = took[size, p] / took[vocab, p]
        cost = found.cost.model_copy(update={"draft_head": [share * ms for ms in found.cost.head[p]]})
        options += [
            _Option(_estimate(c, cost, lengths, coverage), c, tokens, coverage, p, cost) for c in curve
        ]
    return options


def _estimate(candidate: Candidate, cost: Costs, lengths: list[int], coverage: float = 1.0) -> float:
    """Best speedup over draft lengths at this cost, a token being accepted as before times `coverage`.

    Beyond the draft tokens that were rolled out, acceptance is taken to stay what it was for the last.
    """
    rates = [a * coverage for a in candidate.acceptance]
    rates += [rates[-1]] * (lengths[-1] - len(rates))
    reached = list(accumulate(rates, mul))
    return max(cost.speedup(candidate.view, k, 1.0 + sum(reached[:k])) for k in lengths)


def _chosen(found: BridgedChoice, option: _Option, trial: Trial, draft_tokens: int | None) -> HeadChoice:
    """The choice that serves the option; its keep set's point on the curve is the one with its head."""
    point = candidate(option.keep, trial.runs, option.cost)
    curve = [point if c is option.candidate else c for c in found.choice.curve]
    served = choice(trial, curve, option.cost, draft_tokens)
    served_by = replace(found, choice=served, cost=option.cost, judged=trial.speedup)
    return HeadChoice(served_by, option.tokens, option.coverage, option.precision)


def _is_chosen(candidate: Candidate, found: BridgedChoice) -> bool:
    return candidate.view == found.choice.keep


def check_head(request: str, vocab_size: int) -> HeadRequest:
    """Parses `--head`; needs no weights.

    Raises:
        SdfpError: Unless it is auto, full, or a number of tokens below the vocabulary's.
    """
    if request in ("auto", "full"):
        return request
    try:
        tokens = int(request)
    except ValueError:
        tokens = 0
    if not 1 <= tokens < vocab_size:
        raise SdfpError(
            "--head",
            f"{request!r} is no head of a model with {vocab_size} tokens",
            f"Use auto, full, or a number of tokens from 1 to {vocab_size - 1}.",
        )
    return tokens

"""Ways to choose what drafts, one function each: a Problem in, a Choice out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.fit import gradient, local
from sdfp_vllm.fit.cost import MeasuredCost
from sdfp_vllm.fit.families import evenly_spaced, fit_branches, nested_keep_sets
from sdfp_vllm.fit.first_step import FirstStep
from sdfp_vllm.fit.rollout import DraftRollout
from sdfp_vllm.fit.search import Choice, candidate_sizes, fit_family, roll_out, search_family, sizes_asked
from sdfp_vllm.keep import KeepSet
from sdfp_vllm.plan import LayerScore

Selector = Literal["auto", "fit", "gradient"]


@dataclass(frozen=True)
class Problem:
    """What a selector works with.

    Attributes:
        judging: Rollout on the text that keep sets are judged on.
        held: Rollout on other such text, which confirms what was found; only `auto` asks for it.
        form: FIT score, "trace" or "diagonal".
        layers: Fixes the draft's cost at that many layers'; for `fit` the number of layers.
        draft_tokens: Fixes the draft length.
        advance: Called with a line of news after each step.
    """

    judging: DraftRollout
    held: DraftRollout | None
    scores: Sequence[LayerScore]
    cost: MeasuredCost
    form: str = "trace"
    layers: int | None = None
    draft_tokens: int | None = None
    advance: Callable[[str], None] | None = None

    def best_of(self, family: Sequence[KeepSet | list[int]]) -> Choice:
        """The best of keep sets, each rolled out as far as it could win."""
        found = search_family(
            0.0, family, self.judging, self.cost, draft_tokens=self.draft_tokens, advance=self.advance
        )
        assert found is not None  # the first is always rolled out
        return found

    @property
    def sizes(self) -> list[int]:
        return sizes_asked(self.cost.num_layers, self.layers)

    @property
    def sublayers(self) -> bool:
        return self.judging.stack.has_sublayers


def by_fit(problem: Problem) -> Choice:
    """The paper's: the layers with the highest FIT scores, as many as are fastest."""
    return problem.best_of(_fit(problem))


def by_auto(problem: Problem) -> Choice:
    """The best of FIT's layers, FIT's branches and evenly spaced layers, improved by a local search (see `local.py`)."""
    assert problem.held is not None
    family = [KeepSet.of(kept) for kept in _fit(problem)]
    family += evenly_spaced(problem.cost.num_layers, problem.sizes)
    if problem.sublayers:
        ranked = fit_branches(problem.scores, problem.cost, problem.form)
        family += nested_keep_sets(ranked, problem.cost, problem.sizes)
    search = local.LocalSearch(
        problem.judging,
        problem.held,
        problem.cost,
        draft_tokens=problem.draft_tokens,
        budget=problem.layers,
        whole=not problem.sublayers,
        advance=problem.advance,
    )
    starts, curve = roll_out(
        0.0,
        list(dict.fromkeys(family)),
        problem.judging,
        problem.cost,
        draft_tokens=problem.draft_tokens,
        advance=problem.advance,
    )
    return search.improve(starts, curve)


def by_gradient(problem: Problem) -> Choice:
    """Learned gates, whose order gives the keep sets to try (see `gradient.py`)."""
    logits = gradient.learn_gates(
        FirstStep(problem.judging),
        problem.cost,
        advance=lambda n: problem.advance("learning gates") if problem.advance else None,
    )
    family = nested_keep_sets(logits, problem.cost, problem.sizes)
    return problem.best_of(family or _fit(problem))


SELECTORS: dict[str, Callable[[Problem], Choice]] = {
    "fit": by_fit,
    "auto": by_auto,
    "gradient": by_gradient,
}


def most_steps(selector: str, num_layers: int, layers: int | None) -> int:
    """How often a selector reports progress, at most."""
    sizes = 1 if layers else len(candidate_sizes(num_layers))
    return {"fit": sizes, "auto": 3 * sizes + local.MAX_ROLLOUTS, "gradient": gradient.STEPS + sizes}[
        selector
    ]


def check_selector(name: str) -> None:
    """Raises SdfpError unless there is a selector of that name."""
    if name not in SELECTORS:
        raise SdfpError(
            "--selector", f"{name!r} is not known", f"Use one of {', '.join(get_args(Selector))}."
        )


def _fit(problem: Problem) -> list[list[int]]:
    return fit_family(problem.scores, problem.form, problem.sizes)

"""Ways to choose what drafts, one function each: a Problem in, a Choice out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import LayerScore
from sdfp_vllm.plan.view import BRANCHES, DraftView, Precision
from sdfp_vllm.planner import gradient, local
from sdfp_vllm.planner.families import (
    choice_scores,
    evenly_spaced,
    fit_branches,
    nested_keep_sets,
    nested_views,
    spread,
)
from sdfp_vllm.planner.first_step import FirstStep
from sdfp_vllm.planner.memory import UNLIMITED, Memory
from sdfp_vllm.planner.rollout import DraftRollout
from sdfp_vllm.planner.search import (
    MAX_SIZES,
    Choice,
    candidate_sizes,
    fit_family,
    roll_out_chains,
    search_family,
    sizes_asked,
)

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
        precisions: What branches may run at.
        memory: What rounded copies may take.
    """

    judging: DraftRollout
    held: DraftRollout | None
    scores: Sequence[LayerScore]
    cost: Costs
    form: str = "trace"
    layers: int | None = None
    draft_tokens: int | None = None
    advance: Callable[[str], None] | None = None
    precisions: tuple[Precision, ...] = ("full",)
    memory: Memory = UNLIMITED

    @property
    def can_round(self) -> dict[str, bool]:
        """Which branches have rounded copies."""
        return {branch: self.judging.stack.can_round(branch) for branch in BRANCHES}

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
    """The paper's: the layers with the highest FIT scores, as many as are fastest; at each precision there is."""
    return problem.best_of(at_each(_fit(problem), problem))


def by_auto(problem: Problem) -> Choice:
    """The best of several families, improved by a local search (see `local.py`).

    First the whole target at each lower precision, which is hard to beat; then a chain of skipping and rounding in
    the order of FIT's scores (`nested_views`), FIT's layers, FIT's branches and evenly spaced layers.
    """
    assert problem.held is not None
    worth = None
    chains: list[Sequence[KeepSet]] = []
    if problem.precisions != ("full",):
        worth = choice_scores(problem.scores, problem.form)
        if problem.layers is None:
            chains += [[view] for view in at_each([list(range(problem.cost.num_layers))], problem)]
        if problem.layers is None and problem.sublayers:
            views = nested_views(
                problem.scores, problem.cost, problem.precisions, problem.form, problem.memory
            )
            chains.append(spread(views, problem.cost, MAX_SIZES))
    families: list[Sequence[KeepSet | list[int]]] = [_fit(problem)]
    families.append(evenly_spaced(problem.cost.num_layers, problem.sizes))
    if problem.sublayers:
        ranked = fit_branches(problem.scores, problem.cost, problem.form)
        families.append(nested_keep_sets(ranked, problem.cost, problem.sizes))
    for family in families:
        of_family = at_each(family, problem)
        chains += [
            sorted((v for v in of_family if _lowest(v) == p), key=lambda v: -v.size)
            for p in problem.precisions
        ]
    search = local.LocalSearch(
        problem.judging,
        problem.held,
        problem.cost,
        draft_tokens=problem.draft_tokens,
        budget=problem.layers,
        whole=not problem.sublayers,
        advance=problem.advance,
        precisions=problem.precisions,
        memory=problem.memory,
        worth=worth,
        can_round=problem.can_round,
    )
    starts, curve = roll_out_chains(
        chains, problem.judging, problem.cost, draft_tokens=problem.draft_tokens, advance=problem.advance
    )
    return search.improve(starts, curve)


def _lowest(view: KeepSet) -> Precision:
    """The precision that a view of one precision has; of experts beside it, which are in full, nothing is said."""
    rounded = DraftView.of(view).rounded
    return rounded[0][2] if rounded else "full"


def at_each(keeps: Sequence[KeepSet | list[int]], problem: Problem) -> list[KeepSet]:
    """Keep sets at each precision that there is, the lowest first; what memory does not admit is left out.

    All layers at full precision are left out too: that is the target.
    """
    views = [
        DraftView.at(keep, {unit: p for unit in KeepSet.of(keep).units() if problem.can_round[unit[0]]})
        for keep in keeps
        for p in sorted(problem.precisions, key=lambda p: p == "full")
    ]
    whole = problem.cost.num_layers
    return [v for v in dict.fromkeys(views) if (v.rounded or v.size < whole) and problem.memory.admits(v)]


def by_gradient(problem: Problem) -> Choice:
    """Learned gates, whose order gives the keep sets to try (see `gradient.py`)."""
    logits = gradient.learn_gates(
        FirstStep(problem.judging),
        problem.cost,
        advance=lambda n: problem.advance("learning gates") if problem.advance else None,
    )
    family = nested_keep_sets(logits, problem.cost, problem.sizes)
    return problem.best_of(at_each(family or _fit(problem), problem))


SELECTORS: dict[str, Callable[[Problem], Choice]] = {
    "fit": by_fit,
    "auto": by_auto,
    "gradient": by_gradient,
}


def most_steps(selector: str, num_layers: int, layers: int | None, precisions: int = 1) -> int:
    """How often a selector reports progress, at most."""
    sizes = 1 if layers else len(candidate_sizes(num_layers))
    auto = 3 * sizes * precisions + MAX_SIZES * (precisions > 1) + local.MAX_ROLLOUTS
    return {"fit": sizes * precisions, "auto": auto, "gradient": gradient.STEPS + sizes * precisions}[
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

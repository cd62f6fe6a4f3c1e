"""The chain of skipping and rounding: greedy over each branch's hull, within the memory there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import FitScore, LayerScore
from sdfp_vllm.plan.view import BRANCHES, DraftView
from sdfp_vllm.planner.families import choice_scores, nested_views, spread
from sdfp_vllm.planner.memory import UNLIMITED, Memory
from sdfp_vllm.planner.moves import merged, retuned, with_, without
from sdfp_vllm.planner.selectors import at_each
from tests.unit.planner.test_cost import cost
from tests.unit.planner.test_search import flat_cost

COSTS = flat_cost(4, rounded={"int8": 0.5, "int4": 0.25})  # attention 1/4 ms, MLP 3/4 ms
MIDDLE = (1, 2)  # neither first nor last


def branch(skip: float, **rounding: float) -> FitScore:
    return FitScore(
        fisher_trace=skip,
        perturbation_variance=1.0,
        trace_score=skip,
        diagonal_score=skip / 2,
        rounding_scores=rounding,
    )


def layers(*pairs: tuple[FitScore, FitScore]) -> list[LayerScore]:
    return [LayerScore(layer=i, total=a, attention=a, mlp=m) for i, (a, m) in enumerate(pairs)]


def chain(scores, costs=COSTS, precisions=("full", "int8"), memory=UNLIMITED) -> list[DraftView]:
    return nested_views(scores, costs, precisions, "trace", memory)


def steps(views: list[DraftView]) -> list[tuple[str, int, str]]:
    """What changes from one view of a chain to the next: (branch, layer, what it becomes)."""
    found = []
    for before, after in itertools.pairwise(views):
        a, b = before.as_units(), after.as_units()
        assert set(b) <= set(a)
        (changed,) = [unit for unit in a if a[unit] != b.get(unit, "skip")]
        found.append((*changed, b.get(changed, "skip")))
    return found


EVEN = layers(*[(branch(4.0, int8=0.1), branch(12.0, int8=0.3))] * 4)


def test_scores_of_every_choice():
    scores = layers(*[(branch(2.0, int8=0.5), branch(8.0, int8=0.25))] * 4)
    worth = choice_scores(scores, "trace")
    assert worth[("attention", 1), "skip"] == 2.0 and worth[("mlp", 2), "skip"] == 8.0
    assert worth[("attention", 1), "int8"] == 0.5 and worth[("mlp", 0), "int8"] == 0.25
    assert worth[("attention", 0), "skip"] == 10.0 and worth[("mlp", 3), "skip"] == 16.0  # the ends come last
    assert choice_scores(scores, "diagonal")[("mlp", 1), "skip"] == 4.0
    assert len(worth) == 4 * 2 * 2


def test_a_chain_leads_from_the_target_to_next_to_nothing():
    views = chain(EVEN)
    assert views[0] == KeepSet((0, 1, 2, 3))
    assert views[-1].size == 0.5 and len(views[-1].attention) == 1
    assert all(view.layers or view.attention for view in views)
    assert len(steps(views)) == 8 + 7  # each branch is rounded and then skipped, but for the last attention


def test_each_step_is_cheaper_than_the_one_before():
    views = chain(EVEN, precisions=("full", "int8", "int4"))
    times = [COSTS.layers_ms(view, 1) for view in views]
    assert all(b < a for a, b in itertools.pairwise(times))
    assert times[0] == pytest.approx(4.0)


def test_steps_go_by_score_over_the_time_they_save():
    """By hand: attention saves 1/4 ms skipped, 1/8 rounded, the MLP 3/4 and 3/8."""
    scores = layers(
        (branch(9.0, int8=0.01), branch(9.0, int8=0.01)),
        (branch(1.0, int8=0.9), branch(6.0, int8=0.15)),
        (branch(8.0, int8=0.04), branch(4.5, int8=0.375)),
        (branch(9.0, int8=0.02), branch(9.0, int8=0.02)),
    )
    # Over time: mlp 0 .01/.375 = .027, mlp 3 .053, attention 0 .08, attention 3 .16, attention 2 .32, mlp 1 .4,
    # mlp 2 1, attention 1 skipped 1 / .25 = 4 (rounding it is 7.2: not on the hull), mlp 2 (4.5 - .375) / .375 = 11.
    assert steps(chain(scores))[:9] == [
        ("mlp", 0, "int8"),
        ("mlp", 3, "int8"),
        ("attention", 0, "int8"),
        ("attention", 3, "int8"),
        ("attention", 2, "int8"),
        ("mlp", 1, "int8"),
        ("mlp", 2, "int8"),
        ("attention", 1, "skip"),
        ("mlp", 2, "skip"),
    ]


def test_what_saves_nearly_all_for_next_to_nothing_comes_before_skipping():
    """Hull: int8 takes a tenth of the time and costs little, so skipping it all the way comes last."""
    fast = flat_cost(4, rounded={"int8": 0.1})
    taken = steps(chain(EVEN, fast))
    rounding = [s for s in taken if s[2] == "int8"]
    assert rounding == taken[: len(rounding)] and len(rounding) == 8
    # Where rounding harms more than its share of skipping's harm, it is no corner of the hull: straight to skipping.
    harmful = layers(*[(branch(4.0, int8=3.9), branch(12.0, int8=11.9))] * 4)
    assert {c for _, i, c in steps(chain(harmful, fast)) if i in MIDDLE} == {"skip"}


def test_a_branch_goes_down_its_hull_one_corner_at_a_time():
    scores = layers(*[(branch(4.0, int8=0.1, int4=0.5), branch(12.0, int8=0.3, int4=1.5))] * 4)
    taken = steps(chain(scores, precisions=("full", "int8", "int4")))
    mlp = [choice for b, i, choice in taken if (b, i) == ("mlp", 1)]
    assert mlp == ["int8", "int4", "skip"]
    # An int8 that is hardly better than int4 is passed over.
    close = layers(*[(branch(4.0, int8=0.45, int4=0.5), branch(12.0, int8=1.4, int4=1.5))] * 4)
    assert "int8" not in {s[2] for s in steps(chain(close, precisions=("full", "int8", "int4")))}


def test_the_last_attention_stays_and_may_be_rounded():
    """Where attention matters least it is skipped first, and yet the chain goes on over the MLPs."""
    scores = layers(*[(branch(0.01, int8=0.009), branch(12.0, int8=11.0))] * 2)
    views = chain(scores, flat_cost(2, rounded={"int8": 0.5}))
    assert views[-1].size == 0.5 and views[-1].rounded and views[-1].attention
    assert [s[2] for s in steps(views)].count("skip") == 3


def test_the_ends_are_skipped_last():
    taken = [s for s in steps(chain(EVEN)) if s[2] == "skip"]
    order = [i in MIDDLE for _, i, _ in taken]
    assert order == sorted(order, reverse=True)


def test_a_precision_that_nothing_is_scored_for_is_not_taken():
    """A branch of experts has no rounding scores: it is skipped, or it runs in full."""
    experts = layers(*[(branch(4.0, int8=0.1), branch(12.0))] * 4)
    taken = steps(chain(experts))
    assert {s[0] for s in taken if s[2] == "int8"} == {"attention"}


def test_what_the_engine_adds_to_a_branch_is_saved_by_skipping_alone():
    slow = flat_cost(4, rounded={"int8": 0.5}, layer_overhead_ms=4.0)
    # An MLP rounded saves 3/8 ms for 1; skipped it saves 3/4 + 2 ms for 6: the hull goes straight there.
    scores = layers(*[(branch(1.0, int8=1.0), branch(6.0, int8=1.0))] * 4)
    assert {c for _, i, c in steps(chain(scores, slow)) if i in MIDDLE} == {"skip"}
    assert ("mlp", 1, "int8") in steps(chain(scores))


SIZES = {("attention", "int8"): 10, ("mlp", "int8"): 30}


@pytest.mark.parametrize("limit", [0, 9, 10, 45, 100, 160, 1000])
def test_memory_is_respected_and_the_chain_still_ends_at_few_branches(limit):
    memory = Memory(limit, SIZES)
    views = chain(EVEN, memory=memory)
    assert all(memory.admits(view) for view in views)
    assert views[-1].size == 0.5 and views[0].size == 4
    times = [COSTS.layers_ms(view, 1) for view in views]
    assert all(b < a for a, b in itertools.pairwise(times))
    if limit < 10:
        assert not any(view.rounded for view in views)
    else:
        assert max(memory.of(view) for view in views) > min(limit, 160) - 30  # what there is is used
    if limit >= 160:
        assert views == chain(EVEN)


def test_a_branch_that_does_not_fit_goes_on_from_where_it_was():
    """With room for one MLP, others go from full to skipped."""
    taken = steps(chain(EVEN, memory=Memory(30, SIZES)))
    of_mlp = {i: [c for b, j, c in taken if (b, j) == ("mlp", i)] for i in range(4)}
    assert sum("int8" in choices for choices in of_mlp.values()) >= 1
    assert ["skip"] in of_mlp.values()


_score = st.floats(0.0, 10.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[_score] * 6), min_size=2, max_size=5),
    st.floats(0.05, 1.2),
    st.floats(0.05, 1.2),
    st.none() | st.integers(0, 200),
)
def test_any_scores_give_a_chain(numbers, int8, int4, limit):
    scores = layers(*[(branch(a, int8=b, int4=c), branch(d, int8=e, int4=f)) for a, b, c, d, e, f in numbers])
    costs = flat_cost(len(numbers), rounded={"int8": int8, "int4": int4})
    sizes = SIZES | {("attention", "int4"): 5, ("mlp", "int4"): 15}
    memory = Memory(limit, sizes)
    views = chain(scores, costs, ("full", "int8", "int4"), memory)
    assert views[0] == KeepSet(tuple(range(len(numbers)))) and len(set(views)) == len(views)
    times = [costs.layers_ms(view, 1) for view in views]
    assert all(b < a + 1e-12 for a, b in itertools.pairwise(times))
    assert all(memory.admits(view) and (view.layers or view.attention) for view in views)
    assert views[-1].size == 0.5 and views[-1].attention  # nothing but the attention of one layer
    steps(views)
    few = spread(views, costs, 4)
    assert views[0] not in few and len(few) <= 4 and set(few) <= set(views)


def test_a_spread_is_even_in_time_and_leaves_the_target_out():
    views = chain(EVEN, precisions=("full", "int8", "int4"))
    few = spread(views, COSTS, 5)
    times = [COSTS.layers_ms(view, 1) for view in few]
    assert views[0] not in few and len(few) == 5 and times == sorted(times, reverse=True)
    for want, got in zip((20 / 6, 16 / 6, 2.0, 8 / 6, 4 / 6), times, strict=True):  # of 4 ms, in 6 parts
        nearest = min((COSTS.layers_ms(view, 1) for view in views[1:]), key=lambda ms: abs(ms - want))
        assert abs(got - want) == pytest.approx(abs(nearest - want))
    assert len(spread(views, COSTS, 100)) <= len(views) - 1  # none twice


# ---------------------------------------------------------------- moves
def test_retuned_views_differ_in_one_branch():
    view = DraftView.at(KeepSet((0,), attention=(2,)), {("mlp", 0): "int8"})
    moved = retuned(view, ("full", "int8"))
    assert set(moved) == {
        DraftView.at(view, {("mlp", 0): "int8", ("attention", 0): "int8"}),
        DraftView.at(view, "full"),
        DraftView.at(view, {("mlp", 0): "int8", ("attention", 2): "int8"}),
    }
    assert len(moved) == 3 and view not in moved
    assert all(m.keep == view.keep for m in moved)
    assert len(retuned(view, ("full", "int8", "int4"))) == 2 * 3
    assert retuned(view.keep, ("full",)) == []


def test_moves_keep_what_they_do_not_touch_and_add_at_the_usual_precision():
    view = DraftView.at(KeepSet((0, 1)), {("attention", 0): "int8", ("mlp", 0): "int8", ("mlp", 1): "int8"})
    more = with_(view, (("mlp", 3),))
    assert more.as_units() == {**view.as_units(), ("mlp", 3): "int8"}
    assert with_(view, (("mlp", 3),), {"attention": True, "mlp": False}).precision(3, "mlp") == "full"
    assert with_(KeepSet((0,)), (("mlp", 3),)) == KeepSet((0,), mlp=(3,))
    fewer = without(view, (("attention", 1), ("mlp", 1)))
    assert fewer == DraftView.at([0], "int8")
    assert merged(view, fewer, more).as_units() == {**fewer.as_units(), ("mlp", 3): "int8"}


# ---------------------------------------------------------------- families at each precision
def test_keep_sets_are_tried_at_each_precision_but_for_the_target_itself():
    class Given:
        can_round = dict.fromkeys(BRANCHES, True)
        precisions = ("full", "int8", "int4")
        cost = COSTS
        memory = Memory(40, {(b, p): 10 for b in BRANCHES for p in ("int8", "int4")})

    views = at_each([[0, 1, 2, 3], KeepSet((0, 3)), [0, 3]], Given())  # type: ignore[arg-type]
    # All four layers rounded take 80 bytes.
    assert views == [DraftView.at([0, 3], p) for p in ("int8", "int4", "full")]
    Given.memory, Given.can_round = UNLIMITED, {"attention": True, "mlp": False}
    attention = {("attention", i): "int8" for i in range(4)}
    views = at_each([[0, 1, 2, 3]], Given())  # type: ignore[arg-type]
    assert views[0] == DraftView.at(range(4), attention) and len(views) == 2


def test_costs_by_precision_are_what_a_chain_goes_by():
    """A precision that is slower than none is never taken."""
    slower = cost(rounded={"int8": 1.5})
    assert {s[2] for s in steps(chain(EVEN, slower))} == {"skip"}


def test_experts_are_never_given_a_precision():
    """A mixture of experts has no rounded copies: no move may propose one, whatever the rest of the view has."""
    can_round = {"attention": True, "mlp": False}
    view = DraftView.from_units({("attention", 0): "int8", ("mlp", 0): "full", ("attention", 1): "int8"})
    moved = retuned(view, ("full", "int8"), can_round)
    assert moved and all(m.precision(0, "mlp") == "full" for m in moved)
    both = with_(view, (("attention", 2), ("mlp", 2)), can_round)
    assert (both.precision(2, "attention"), both.precision(2, "mlp")) == ("int8", "full")

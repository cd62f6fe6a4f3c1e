"""DraftView: what runs, and at which precision; and that at full precision it is a keep set."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import BRANCHES, PRECISIONS, ROUNDED, DraftView

LAYERS = 5
ATTENTION = ["full", "skip", "int8", "int8", "skip"]
MLP = ["int8", "skip", "int8", "skip", "fp8"]
VIEW = DraftView.from_modes(ATTENTION, MLP)
UNITS = {
    ("attention", 0): "full",
    ("mlp", 0): "int8",
    ("attention", 2): "int8",
    ("mlp", 2): "int8",
    ("attention", 3): "int8",
    ("mlp", 4): "fp8",
}

_modes = st.lists(st.sampled_from(["skip", *PRECISIONS]), min_size=LAYERS, max_size=LAYERS)


def test_it_is_made_of_what_is_chosen_for_each_branch():
    assert (VIEW.layers, VIEW.attention, VIEW.mlp) == ((0, 2), (3,), (4,))
    assert VIEW.modes("attention", LAYERS) == ATTENTION and VIEW.modes("mlp", LAYERS) == MLP
    assert VIEW.as_units() == UNITS and DraftView.from_units(UNITS) == VIEW
    assert VIEW.keep == KeepSet((0, 2), (3,), (4,)) and type(VIEW.keep) is KeepSet
    assert VIEW.touched() == [0, 2, 3, 4] and VIEW.size == 3 and VIEW.partial


@given(_modes, _modes)
def test_modes_and_units_are_read_back(attention, mlp):
    view = DraftView.from_modes(attention, mlp)
    assert (view.modes("attention", LAYERS), view.modes("mlp", LAYERS)) == (attention, mlp)
    again = DraftView.from_units(view.as_units())
    assert again == view and hash(again) == hash(view)
    chosen = {("attention", i): c for i, c in enumerate(attention)} | {
        ("mlp", i): c for i, c in enumerate(mlp)
    }
    for (branch, i), choice in chosen.items():
        assert (branch in view.branches(i)) == (choice != "skip")
        assert view.precision(i, branch) == ("full" if choice == "skip" else choice)
    assert view.problem(LAYERS) is None or not view.touched()
    assert list(view.rounded) == sorted(view.rounded)


@given(_modes, _modes)
def test_a_view_at_full_precision_is_the_keep_set_of_its_branches(attention, mlp):
    view = DraftView.from_modes(attention, mlp)
    full = DraftView.of(view.keep)
    assert full == view.keep and view.keep == full and hash(full) == hash(view.keep)
    assert full in {view.keep} and view.keep in {full: None}
    assert (view == view.keep) == (view.keep == view) == (not view.rounded)
    assert (view != view.keep) == bool(view.rounded)


def test_precision_tells_views_apart():
    keep = KeepSet((0, 1))
    views = [DraftView.at(keep, p) for p in PRECISIONS]
    assert len(set(views)) == len(PRECISIONS) and len({*views, keep}) == len(PRECISIONS)
    assert DraftView.at(keep, {("mlp", 1): "int8"}) not in (keep, views[1])
    assert DraftView.at(KeepSet((0,)), "int8") != DraftView.at(KeepSet((1,)), "int8")
    assert keep != (keep.layers, (), ()) and DraftView.of(keep) != "0 1"


def test_one_precision_for_all_or_one_for_each():
    keep = KeepSet((1,), attention=(3,))
    assert DraftView.at(keep, "int4").as_units() == dict.fromkeys(keep.units(), "int4")
    named = {
        ("attention", 3): "fp8",
        ("mlp", 3): "int8",
        ("mlp", 0): "int8",
    }  # those that don't run are ignored
    assert DraftView.at(keep, named).rounded == (("attention", 3, "fp8"),)
    assert DraftView.at([0, 2], "full") == KeepSet((0, 2)) == DraftView.at(range(0, 4, 2), {})
    assert DraftView.at(VIEW, "full") == VIEW.keep  # a view's own precisions are replaced
    assert DraftView.of(VIEW) is VIEW and KeepSet.of(VIEW) is VIEW
    assert DraftView.of([1, 3]) == KeepSet((1, 3))


def test_what_lies_behind_a_layer_keeps_its_precision():
    assert VIEW.after(-1) == VIEW
    assert VIEW.after(1).as_units() == {unit: p for unit, p in UNITS.items() if unit[1] > 1}
    assert VIEW.after(2).as_units() == {("attention", 3): "int8", ("mlp", 4): "fp8"}
    assert VIEW.after(4).as_units() == {} and isinstance(VIEW.after(2), DraftView)
    assert KeepSet((0, 2), (3,)).after(1) == KeepSet((2,), (3,))


def test_precision_of_a_branch():
    assert [VIEW.precision(i, "mlp") for i in (0, 2, 4)] == ["int8", "int8", "fp8"]
    assert VIEW.precision(0, "attention") == "full" == VIEW.precision(1, "attention")
    assert KeepSet((0,)).precision(0, "mlp") == "full"
    assert set(ROUNDED) == set(PRECISIONS) - {"full"} and BRANCHES == ("attention", "mlp")


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (DraftView.of([0, 3]), "0 3"),
        (DraftView.at([0, 3], "int8"), "0 3, in int8"),
        (DraftView.at(KeepSet((0,), (1,), (2, 3)), "fp8"), "0, attention of 1, MLP of 2 3, in fp8"),
        (DraftView.at([0, 3], {("attention", 0): "int8"}), "0 3, in full but for attention 0 int8"),
        (
            VIEW,
            "0 2, attention of 3, MLP of 4, in int8 but for attention 0 full, mlp 4 fp8",
        ),
        (DraftView(), "nothing"),
    ],
)
def test_said_in_words(view, text):
    assert str(view) == text


@pytest.mark.parametrize("carry", [lambda v: pickle.loads(pickle.dumps(v)), copy.copy, copy.deepcopy])
@pytest.mark.parametrize("asked", [False, True])
def test_it_travels(carry, asked):
    view = DraftView.from_modes(ATTENTION, MLP)
    if asked:
        assert view.precision(4, "mlp") == "fp8"
    there = carry(view)
    assert there == view and hash(there) == hash(view) and there.as_units() == UNITS
    assert there.precision(2, "attention") == "int8" and str(there) == str(view)


def test_what_is_wrong_with_it_is_said_as_of_a_keep_set():
    assert "nothing would draft" in (DraftView().problem(4) or "")
    assert "names layer 4" in (DraftView.at([0, 4], "int8").problem(4) or "")
    assert DraftView.at([0, 3], "int8").problem(4) is None

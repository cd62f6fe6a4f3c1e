"""KeepSet: the value that plan, search and runtime agree on."""

from __future__ import annotations

from sdfp_vllm.plan.keep import KeepSet


def test_branches_make_layers_where_both_run():
    keep = KeepSet.from_branches(attention=[4, 0, 2], mlp={2, 5, 0})
    assert keep == KeepSet(layers=(0, 2), attention=(4,), mlp=(5,))
    assert keep.partial and keep.size == 3.0 and keep.touched() == [0, 2, 4, 5]
    assert [sorted(keep.branches(i)) for i in (0, 1, 4, 5)] == [
        ["attention", "mlp"],
        [],
        ["attention"],
        ["mlp"],
    ]
    assert str(keep) == "0 2, attention of 4, MLP of 5"


def test_a_list_of_layers_is_a_keep_set():
    keep = KeepSet.of([0, 3])
    assert keep == KeepSet((0, 3)) and not keep.partial and KeepSet.of(keep) is keep
    assert str(keep) == "0 3"


def test_problems_are_named():
    assert KeepSet((0, 3), (1,), (2,)).problem(4) is None
    assert "all empty" in (KeepSet().problem(4) or "")
    assert "kept_mlp names layer 4" in (KeepSet((0,), mlp=(4,)).problem(4) or "")
    assert "kept_layers names layer -1" in (KeepSet((-1,)).problem(4) or "")
    assert "share [1]" in (KeepSet(attention=(1,), mlp=(1,)).problem(4) or "")

"""Memory: what rounded copies take, how much they may, and how a user says so."""

from __future__ import annotations

import pytest

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.memory import UNLIMITED, Memory, parse_memory

BYTES = {("attention", "int8"): 10, ("mlp", "int8"): 30, ("attention", "int4"): 6, ("mlp", "int4"): 16}
MEMORY = Memory(limit=100, branches=BYTES, head={"full": 0, "int8": 50})
KEEP = KeepSet((0, 1), attention=(2,))


def test_copies_are_counted_by_branch_and_precision():
    assert MEMORY.of(KEEP) == 0 == MEMORY.of(DraftView.of(KEEP))
    assert MEMORY.of(DraftView.at(KEEP, "int8")) == 3 * 10 + 2 * 30
    mixed = DraftView.at(KEEP, {("attention", 0): "int8", ("mlp", 1): "int4"})
    assert MEMORY.of(mixed) == 10 + 16
    assert MEMORY.of(mixed, "int8") == 26 + 50 and MEMORY.of(mixed, "full") == 26
    assert Memory().of(mixed) == 0  # nothing known to take anything


def test_the_limit_is_what_may_be_taken_and_no_more():
    whole = DraftView.at(KEEP, "int8")  # 90
    assert MEMORY.admits(whole) and not MEMORY.admits(whole, "int8")
    assert MEMORY.less(10).admits(whole) and not MEMORY.less(11).admits(whole)
    assert MEMORY.admits_bytes(100) and not MEMORY.admits_bytes(101)
    none = MEMORY.less(100)
    assert none.limit == 0 and none.admits(KEEP) and not none.admits(DraftView.at(KEEP, "int4"))
    assert MEMORY.less(10).branches == BYTES and MEMORY.limit == 100


def test_without_a_limit_all_is_admitted():
    assert UNLIMITED.admits(DraftView.at(range(1000), "int8"), "int8") and UNLIMITED.admits_bytes(1 << 60)
    assert UNLIMITED.less(1 << 60) is UNLIMITED


@pytest.mark.parametrize(
    ("asked", "bytes_"),
    [
        (None, None),
        ("0", 0),
        ("0MB", 0),
        ("0%", 0),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        (" 2GiB ", 2 << 30),
        ("1.5KiB", 1536),
        ("1.5kb", 1500),
        ("3TB", 3_000_000_000_000),
        ("1MiB", 1 << 20),
        ("7B", 7),
        ("30%", 300),
        ("12.5%", 125),
        ("150%", 1500),
    ],
)
def test_amounts(asked, bytes_):
    assert parse_memory(asked, 1000) == bytes_


@pytest.mark.parametrize(
    "asked",
    ["", "much", "500", "1.5", "-1MB", "MB", "%", "1 000MB", "1e3MB", "5PB", "1MB2", "nan%", "1..5MB"],
)
def test_what_is_no_amount_is_refused(asked):
    with pytest.raises(SdfpError, match=r"--extra-memory: .* is no amount of memory.*500MB, 2GiB, 30% or 0"):
        parse_memory(asked, 1000)

"""The study of long contexts: which requests it asks, and what it makes of measured turns."""

from __future__ import annotations

import pytest

from benchmarks.studies.long_context import _VIEWS, CONTINUED, Group, Request, groups_of, rows_of
from sdfp_vllm.measure.spec import Measurement, TurnMeasurement


def turn(seconds: float, decoding: float, tokens: int = 5) -> TurnMeasurement:
    return TurnMeasurement(
        token_ids=[list(range(tokens))], texts=[""], seconds=seconds, decode_seconds=decoding
    )


def engine(*turns: TurnMeasurement) -> Measurement:
    return Measurement(turns=list(turns), start_seconds=0.0, kv_bytes_per_token=None, vllm_version="")


def test_every_kind_is_asked_alone_of_every_document_and_kinds_are_mixed_in_batches():
    groups = groups_of([512, 1024], documents=2, together=[4, 8])
    assert [g.context for g in groups] == [512] * 8 + [1024] * 8
    alone, mixed = groups[:6], groups[6:8]
    assert {(r.document, r.kind) for g in alone for r in g.requests} == {
        (d, k) for d in (0, 1) for k in (CONTINUED, "summary", "question")
    }
    four, eight = (g.requests for g in mixed)
    assert len({r.kind for r in four}) == 4 and {r.document for r in four} == {0, 1}
    assert len(set(eight)) == 8  # no request twice


def test_rows_are_ratios_to_plain_with_the_prefill_where_all_of_it_was_read():
    groups = [Group(c, CONTINUED, (Request(0, CONTINUED),)) for c in (512, 1024)]
    fill, longer = turn(2.0, 0.0, tokens=1), turn(3.0, 0.0, tokens=1)
    drafted = [turn(0.0, s) for s in (4.0, 2.0, 1.0, 5.0)]
    measured = {
        "plain": engine(fill, turn(0.0, 4.0), longer, turn(0.0, 10.0)),
        "plain, bfloat16": engine(fill, turn(0.0, 2.0), longer, turn(0.0, 8.0)),
        "sdfp": engine(fill, *drafted, longer, *drafted),
    }
    rows = {(r["context"], r["method"]): r for r in rows_of(groups, measured)}
    assert len(rows) == 2 * (2 + len(_VIEWS))
    window = rows[1024, "sdfp, window"]
    assert window["ratio"] == pytest.approx(5.0) and window["against_bfloat16"] == pytest.approx(4.0)
    short = rows[512, "sdfp, window"]
    assert short["prefill_seconds"] == 2.0 and short["with_prefill"] == pytest.approx((2 + 4) / (2 + 2))
    assert "with_prefill" not in window  # its beginning was in the cache
    assert rows[512, "plain, bfloat16"]["ratio"] == pytest.approx(2.0)


def test_a_cell_whose_answers_end_at_once_has_no_speed():
    groups = [Group(512, "summary", (Request(0, "summary"),))]
    ended = turn(0.0, 0.0, tokens=1)
    measured = {"plain": engine(ended, ended), "sdfp": engine(ended, *[ended] * 4)}
    assert rows_of(groups, measured) == []

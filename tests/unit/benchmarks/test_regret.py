"""The regret of pacing, from turns that were measured."""

from __future__ import annotations

import pytest

from benchmarks.studies.regret import DEFAULT, PACED, rotated, rows_of
from sdfp_vllm.measure.spec import TurnMeasurement

TOKENS = [7, 8, 9, 10, 11]
GROUPS = [(0, [[1]]), (1, [[2]])]


def turn(seconds: float, ids: list[int] = TOKENS) -> TurnMeasurement:
    """An answer of five tokens, four of them decoded in `seconds`."""
    return TurnMeasurement(
        token_ids=[ids],
        texts=[""],
        seconds=9.0,
        decode_seconds=seconds,
        rounds=2,
        draft_tokens=4,
        accepted_tokens=3,
    )


def test_regret_is_to_the_best_fixed_length_and_to_the_best_of_each_phase():
    measured = {
        "0 drafts": [turn(4.0), turn(2.0)],  # a second a token, then half of one
        "2 drafts": [turn(2.0), turn(3.0)],
        PACED: [turn(2.0), turn(2.5)],
        DEFAULT: [turn(1.0), turn(2.0, ids=TOKENS[::-1])],
    }
    rows, best = rows_of(measured, GROUPS, 2, [TOKENS, TOKENS])
    by = {r["method"]: r for r in rows}
    assert best == "2 drafts"
    assert by[PACED]["tokens_per_second"] == [2.0, 1.6]
    assert by[PACED]["regret"] == pytest.approx(4.5 / 5 - 1, abs=1e-4)
    assert by[PACED]["regret_to_best_of_each_phase"] == pytest.approx(4.5 / 4 - 1, abs=1e-4)
    assert by[PACED]["regret_by_phase"] == [0.0, 0.25]
    assert by[PACED]["acceptance_rate"] == 0.75 and by[PACED]["tokens_per_round"] == 2.5
    assert [by[m]["identical_texts"] for m in (PACED, DEFAULT)] == [2, 1]


def test_every_setting_is_first_in_turn():
    assert [rotated("abc", n)[0] for n in range(4)] == ["a", "b", "c", "a"]

"""Chances and averages that follow what is seen."""

from __future__ import annotations

import pytest

from sdfp_vllm.pacing.odds import Average, Odds, PositionOdds


def test_odds_follow_and_forget():
    odds = Odds([0.9, 0.1], weight=4, memory=50)
    assert odds[0] == 0.9 and odds[7] == pytest.approx(0.1)  # past the last bucket is the last
    for _ in range(500):
        odds.observe(0, False)
    assert odds[0] < 0.01 and odds[1] == pytest.approx(0.1)


def test_positions_never_reached_follow_those_that_are_and_forget_what_they_knew():
    odds = PositionOdds([0.8, 0.7, 0.6], positions=5, memory=100)
    assert [odds[j] for j in (0, 2, 4, 9)] == [0.8, 0.6, 0.6, 0.6]
    for _ in range(300):
        odds.observe(3, 4)  # three accepted, the fourth not
    assert odds[0] > 0.95 and odds[3] < 0.2
    for _ in range(1000):
        odds.observe(0, 1)
    assert odds[0] < 0.05 and odds[1] < 0.12  # scaled with the first
    for _ in range(1000):
        odds.observe(1, 1)
    assert odds[0] > 0.95 and 0.7 < odds[3] < 0.75  # the plan's 0.6, scaled; the bad time is forgotten


def test_an_average_is_a_sum_over_a_count():
    average = Average(2.0, weight=3.0, memory=1e9)
    average.observe(20.0, count=5.0)
    assert average.value == pytest.approx((6 + 20) / (3 + 5))

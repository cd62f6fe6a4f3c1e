"""What pacing is compared with: as many drafts in every round, in the same engine."""

from __future__ import annotations

import pytest

from sdfp_vllm.pacing.fixed import FixedPolicy
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Row
from tests.support.pacing_traffic import costs, simulate, steady


@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_round_has_its_drafts_and_pacing_learns_nothing(count):
    paced = DraftPolicy(costs(), longest=8)
    before = [odds[0] for odds in paced.position], paced.rate([GREEDY])
    fixed = FixedPolicy(paced, count)
    tokens, _, rounds = simulate(fixed, steady(0.0), 50, batch=3)  # nothing is accepted, and it goes on
    assert {r.steps for r in rounds} == {count} and tokens == 150
    assert {row.drafts for r in rounds for row in r.rows} == {count}
    assert ([odds[0] for odds in paced.position], paced.rate([GREEDY])) == before


def test_no_more_than_there_is_room_for():
    _, _, rounds = simulate(FixedPolicy(DraftPolicy(costs(), longest=2), 20), steady(1.0), 5)
    assert {r.steps for r in rounds} == {2}


def test_who_may_not_draft_does_not():
    fixed = FixedPolicy(DraftPolicy(costs(), longest=8), 3)
    round = fixed.begin([Row(GREEDY), Row(None), Row(GREEDY, most=1)])
    while round.goes_on():
        round.saw([0.9, 0.9, 0.9])
    assert [row.drafts for row in round.rows] == [3, 0, 1] and round.verified == 3 + 4

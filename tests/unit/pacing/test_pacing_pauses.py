"""Traffic that drafting cannot speed up: it costs almost nothing, and is asked again now and then."""

from __future__ import annotations

import pytest

from sdfp_vllm.pacing.pauses import FIRST, LONGEST, Pauses
from sdfp_vllm.pacing.policy import DraftPolicy
from tests.support.pacing_traffic import costs, simulate, steady


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_where_drafting_cannot_pay_it_costs_almost_nothing(batch):
    policy = DraftPolicy(costs(), longest=16)  # whose plan promised 0.8
    tokens, ms, rounds = simulate(policy, steady(0.05), 4000, batch)
    assert tokens / ms > 0.99 * costs().plain_rate(batch)
    assert sum(round.steps for round in rounds[-1000:]) > 0  # it goes on asking
    assert sum(round.steps > 0 for round in rounds[-1000:]) < 20


def test_it_comes_back_when_drafting_pays_again():
    policy = DraftPolicy(costs(), longest=16)
    simulate(policy, steady(0.0), 2000)
    _, _, rounds = simulate(policy, steady(0.95), 4000, seed=1)
    assert sum(round.steps > 0 for round in rounds[-500:]) > 490


def test_nothing_is_tried_that_could_not_pay_were_every_draft_right():
    dear = costs(rows=[1, 64], target_ms=[10.0, 640.0], acceptance=[0.0])
    _, _, rounds = simulate(DraftPolicy(dear, longest=8), steady(1.0), 500, batch=4)
    assert sum(round.steps for round in rounds) == 0


def test_pauses_double_up_to_the_longest_and_begin_anew_when_it_pays():
    pauses = Pauses()
    tries = [i for i in range(1000) if pauses.over(8)]
    lengths = [b - a - 1 for a, b in zip([-1, *tries], tries, strict=False)]
    assert lengths[:3] == [FIRST, 2 * FIRST, 4 * FIRST]
    assert set(lengths[3:]) == {LONGEST}
    pauses.end(16)  # of other batches: nothing changes
    assert not any(pauses.over(8) for _ in range(FIRST))
    pauses.end(15)  # of the same power of two
    assert [pauses.over(8) for _ in range(FIRST + 1)] == [False] * FIRST + [True]

"""What a draft has to earn."""

from __future__ import annotations

import pytest

from sdfp_vllm.pacing.policy import CAUTION, GREEDY, DraftPolicy
from tests.support.pacing_traffic import BINS, costs, simulate, steady


def test_where_drafting_is_much_faster_a_draft_has_to_earn_the_rate_and_no_more():
    policy = DraftPolicy(costs(), longest=8)
    simulate(policy, steady(0.8), 100)
    assert policy.rate([GREEDY]) > 1.2 * CAUTION * policy.costs.plain_rate(1)
    assert policy.worth_of_ms([GREEDY]) == policy.rate([GREEDY])


def test_where_it_is_hardly_faster_than_plain_decoding_it_has_to_be_surely_so():
    policy = DraftPolicy(costs(acceptance=[0.1] * 8, confidence=[0.1] * BINS), longest=8)
    simulate(policy, steady(0.1), 100)
    assert policy.worth_of_ms([GREEDY]) == pytest.approx(CAUTION * policy.costs.plain_rate(1))


def test_rounds_without_drafts_do_not_mix_in_until_the_rate_is_low_enough():
    """Drafts that are all right and cost four fifths of a plain step each: eight of them are 1.27 times plain decoding."""
    plan = costs(
        rows=[1, 64], target_ms=[10.0, 10.0], draft_ms=[8.0, 8.0], acceptance=[1.0], confidence=[1.0] * BINS
    )
    policy = DraftPolicy(plan, longest=8)
    _, _, rounds = simulate(policy, steady(1.0), 200)
    assert sum(r.steps for r in rounds) == 8 * 200
    assert policy.rate([GREEDY]) == pytest.approx(1.268 * policy.costs.plain_rate(1), rel=0.01)

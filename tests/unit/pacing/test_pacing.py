"""The pacing policy: what it decides, and how far it is from the best that could be done."""

from __future__ import annotations

import random

import pytest

from sdfp_vllm.pacing.ngram import LONGEST, Match
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Row
from sdfp_vllm.pacing.record import Pacing
from tests.support.pacing_traffic import BINS, costs, simulate, steady


def best_fixed(pacing: Pacing, chance: float, batch: int = 1) -> float:
    """Tokens per millisecond of the best fixed draft length, 0 included."""

    def rate(k: int) -> float:
        tokens = batch * sum(chance**j for j in range(k + 1))
        return tokens / (
            k * pacing.step_ms(batch) + pacing.verify_ms(batch * (k + 1)) + pacing.round_overhead_ms
        )

    return max(rate(k) for k in range(17))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("chance", [0.5, 0.8, 0.95])
def test_on_steady_traffic_it_is_as_good_as_the_best_fixed_length(chance, batch):
    policy = DraftPolicy(costs(), longest=16)
    simulate(policy, steady(chance), 300, batch)  # learns
    tokens, ms, _ = simulate(policy, steady(chance), 3000, batch, seed=1)
    assert tokens / ms > 0.97 * best_fixed(costs(), chance, batch)


def test_confidence_that_tells_right_from_wrong_beats_every_fixed_length():
    def draft(rng: random.Random) -> tuple[float, bool]:
        sure = rng.random() < 0.7
        return (0.97, rng.random() < 0.98) if sure else (0.35, rng.random() < 0.2)

    policy = DraftPolicy(costs(), longest=16)
    simulate(policy, draft, 300)
    tokens, ms, _ = simulate(policy, draft, 3000, seed=1)
    assert tokens / ms > 1.05 * best_fixed(costs(), 0.7 * 0.98 + 0.3 * 0.2)


def test_requests_of_a_batch_stop_each_by_its_own_confidence():
    cheap = costs(draft_ms=[0.2, 0.5], confidence=[0.05] * (BINS - 1) + [0.99])
    policy = DraftPolicy(cheap, longest=4)
    round = policy.begin([Row(GREEDY), Row(GREEDY), Row(None)])
    while round.goes_on():
        round.saw([1.0, 0.2, 1.0])
    assert [row.drafts for row in round.rows] == [4, 0, 0]
    assert round.verified == 3 + 4


def test_no_draft_is_made_for_tokens_that_a_request_may_not_be_given():
    sure = costs(acceptance=[1.0], confidence=[1.0] * BINS, draft_ms=[0.1, 0.2])
    policy = DraftPolicy(sure, longest=8)
    match = Match(LONGEST, [1] * 8)
    rows = [
        Row(GREEDY, most=0, match=match),
        Row(GREEDY, most=2, match=match),
        Row(GREEDY, most=3),
        Row(GREEDY, most=0),
    ]
    round = policy.begin(rows)
    while round.goes_on():
        round.saw([1.0] * 4)
    assert [row.drafts for row in rows] == [0, 2, 3, 0] and round.steps == 3
    round = policy.begin([Row(GREEDY, most=0)])
    assert not round.goes_on()


def test_the_longest_draft_is_never_exceeded():
    policy = DraftPolicy(costs(acceptance=[1.0], confidence=[1.0] * BINS), longest=3)
    _, _, rounds = simulate(policy, steady(1.0), 50)
    assert {round.steps for round in rounds} == {3}

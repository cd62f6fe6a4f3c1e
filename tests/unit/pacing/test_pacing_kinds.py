"""Requests whose rules reject drafts, beside others: each kind is drafted for by its own luck."""

from __future__ import annotations

import random

from sdfp_vllm.pacing.batch import BatchPolicy
from sdfp_vllm.pacing.ngram import LONGEST, Match
from sdfp_vllm.pacing.policy import GREEDY, RULED, DraftPolicy, Row
from tests.support.pacing_traffic import costs


def traffic(policy: DraftPolicy, chances: dict[int, float], kinds: list[int], rounds: int) -> list[int]:
    """Runs rounds of a batch whose drafts are right by kind; returns drafts a request in the last half, by row."""
    rng, drafted = random.Random(0), [0] * len(kinds)
    for r in range(rounds):
        rows = [Row(kind) for kind in kinds]
        round = policy.begin(rows)
        while round.goes_on():
            round.saw([0.85] * len(rows))
        accepted = [
            next((j for j in range(row.drafts) if rng.random() > chances[row.kind or 0]), row.drafts)
            for row in rows
        ]
        policy.settle(round, accepted, [row.drafts for row in rows])
        if r >= rounds // 2:
            drafted = [n + row.drafts for n, row in zip(drafted, rows, strict=True)]
    return drafted


def with_a_queue() -> DraftPolicy:
    """Every place is taken at once: a token is worth the same whoever gains it."""
    policy = DraftPolicy(costs(), longest=8)
    for _ in range(200):
        policy.places.observe(stayed=3, ended=1, came=1)
    return policy


def test_plain_requests_keep_their_odds_and_their_drafts_beside_ruled_ones():
    """Fewer drafts than in a batch of their own alone for what a step costs: two pay it where four did."""
    chances = {GREEDY: 0.9, RULED: 0.02}
    own, mixed = with_a_queue(), with_a_queue()
    alone = traffic(own, chances, [GREEDY] * 4, 400)
    beside = traffic(mixed, chances, [GREEDY, GREEDY, RULED, RULED], 400)
    assert abs(mixed.position[GREEDY][0] - own.position[GREEDY][0]) < 0.05
    assert min(beside[:2]) > 0.6 * max(alone)
    assert max(beside[2:]) < 0.6 * min(beside[:2])


def test_traffic_of_ruled_requests_alone_stops_drafting_and_leaves_the_others_odds():
    policy = DraftPolicy(costs(), longest=8)
    before = policy.position[GREEDY][0], policy.rate([GREEDY]), policy.copying[GREEDY][9]
    assert sum(traffic(policy, {RULED: 0.0}, [RULED], 1000)) < 50
    policy.learn_copying(Match(10, [1, 2]), [7], RULED)
    assert (policy.position[GREEDY][0], policy.rate([GREEDY]), policy.copying[GREEDY][9]) == before
    assert policy.copying[RULED][9] < before[2]


def test_who_wants_no_drafts_gets_neither_steps_nor_copies_and_teaches_nothing_of_what_drafts_yield():
    policy = DraftPolicy(costs(), longest=8)
    match = Match(LONGEST, [1] * 8)
    rate = policy.rate([GREEDY])
    for _ in range(100):
        round = policy.begin([Row(GREEDY, match, most=0)])
        assert not round.goes_on() and not round.rows[0].drafts
        policy.settle(round, [0], [0])
    assert policy.rate([GREEDY]) == rate


def test_one_length_for_a_batch_weighs_ruled_requests_by_their_share():
    policy = BatchPolicy(costs(), [0, 5])
    length = policy[4]
    for _ in range(600):
        policy.observe(5, 0, ruled=True)
    assert policy[4] == length == 5
    policy.ruled = 1.0
    assert policy[4] == 0
    policy.ruled = 0.25
    assert policy[4] == 5

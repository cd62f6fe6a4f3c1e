"""Tokens that only some of a batch gain are worth what their places are: taken by others, or left empty."""

from __future__ import annotations

import random

import pytest

from sdfp_vllm.pacing.ngram import LONGEST, Match
from sdfp_vllm.pacing.places import Places
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Round, Row
from tests.support.pacing_traffic import BINS, costs

# Up to 8 rows cost what one does, every further one computes: what a small machine is like.
COMPUTE_BOUND = dict(
    rows=[1, 8, 16, 64], target_ms=[50.0, 55.0, 80.0, 240.0], draft_ms=[12.0, 15.0, 22.0, 60.0]
)


def static_batch(
    policy: DraftPolicy, batch: int, tokens: int, found: float, seed: int
) -> tuple[float, list[Round]]:
    """A batch that starts together and gets no new requests: (milliseconds until the last has its tokens, rounds).

    Half of the requests repeat themselves: with the chance `found` a round finds a match, of which 6 tokens are right.
    Half of all model drafts are right.
    """
    rng = random.Random(seed)
    left, ms, rounds = dict.fromkeys(range(batch), tokens), 0.0, []
    while left:
        rows = [
            Row(GREEDY, Match(9, [0] * 6) if r % 2 and rng.random() < found else None, most=n - 1)
            for r, n in left.items()
        ]
        round = policy.begin(rows)
        while round.goes_on():
            round.saw([0.85] * len(rows))
        accepted = [
            row.drafts if row.copies else sum(rng.random() < 0.5 for _ in range(row.drafts)) for row in rows
        ]
        for row in rows:
            if row.match:
                policy.learn_copying(row.match, row.match.tokens)
        policy.settle(round, accepted, [row.drafts for row in rows])
        ms += round.ms
        rounds.append(round)
        after = {r: n - 1 - a for (r, n), a in zip(left.items(), accepted, strict=True) if n > 1 + a}
        policy.places.observe(len(after), len(left) - len(after), 0)
        left = after
    return ms, rounds


@pytest.mark.parametrize("batch", [4, 8, 16, 32])
def test_a_batch_that_only_some_get_ahead_of_is_not_made_to_wait_for_them(batch):
    pacing = costs(acceptance=[0.5] * 8, confidence=[0.5] * BINS, **COMPUTE_BOUND)
    policy = DraftPolicy(pacing, longest=8)
    static_batch(policy, batch, 100, 0.3, seed=0)  # learns
    ratios = []
    for seed in range(1, 5):
        ms, _ = static_batch(policy, batch, 100, 0.3, seed)
        ratios.append(100 * pacing.plain_ms(batch) / ms)
    assert min(ratios) > 0.98


def test_copies_of_some_pay_where_the_places_of_those_that_end_are_taken():
    policy = DraftPolicy(costs(**COMPUTE_BOUND, acceptance=[0.1] * 8), longest=8)
    sure = Match(LONGEST, [5] * 8)
    for _ in range(200):
        policy.learn_copying(sure, sure.tokens)

    def copying() -> int:
        return sum(
            row.copies for row in policy.begin([Row(GREEDY, sure if i < 2 else None) for i in range(16)]).rows
        )

    for _ in range(50):
        policy.places.observe(stayed=15, ended=1, came=0)
    assert copying() == 0
    for _ in range(300):
        policy.places.observe(stayed=15, ended=1, came=1)
    assert copying() == 2


def test_a_small_gain_is_left_to_batches_whose_places_are_taken():
    """Two tokens of luck more or less, and a round for those behind costs what a small gain brings."""
    slight = costs(
        rows=[1, 64], target_ms=[10.0, 80.0], draft_ms=[3.6, 64.5], acceptance=[0.9], confidence=[0.9] * BINS
    )
    policy = DraftPolicy(slight, longest=1)
    alone, full = policy.begin([Row(GREEDY)]), policy.begin([Row(GREEDY) for _ in range(4)])
    assert alone.goes_on() and not full.goes_on()
    for _ in range(500):
        policy.places.observe(stayed=3, ended=1, came=1)
    assert policy.begin([Row(GREEDY) for _ in range(4)]).goes_on()


def test_whether_places_are_taken_is_not_told_by_a_batch_of_other_requests():
    places = Places()
    before = places.taken
    places.observe(stayed=0, ended=4, came=4)
    places.observe(stayed=4, ended=0, came=4)
    assert places.taken == before
    for _ in range(500):
        places.observe(stayed=3, ended=1, came=5)
    assert places.taken == pytest.approx(1.0, abs=0.01)

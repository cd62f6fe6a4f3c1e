"""A round is as long for those who gain nothing by it: whoever is behind its batch comes first."""

from __future__ import annotations

import random

import pytest

from sdfp_vllm.pacing.ngram import Match
from sdfp_vllm.pacing.paces import Paces
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Row
from tests.support.pacing_traffic import BINS, costs

# Up to 2 rows cost what one does, every further one computes; drafts of the model never pay.
DEAR_ROWS = dict(
    rows=[1, 2, 4, 8, 16, 64], target_ms=[30.0, 31.0, 34.0, 50.0, 80.0, 260.0], draft_ms=[30.0] * 6
)


def served(batch: int, found: float, fair: bool, rounds: int = 1500, seed: int = 0) -> list[float]:
    """Milliseconds per token of each seat of a full server; the first quarter's requests repeat themselves.

    With the chance `found` one of these finds a match in a round; nine in ten of its copies are right to the sixth token,
    the others are wrong at once. Whoever ends is followed by another of the same kind.
    """
    rng = random.Random(seed)
    policy = DraftPolicy(costs(acceptance=[0.3] * 8, confidence=[0.3] * BINS, **DEAR_ROWS), longest=16)
    for _ in range(300):
        policy.places.observe(1, 1, 1)  # there is a queue
    paces, names = Paces(), [str(i) for i in range(batch)]
    tokens, ms = [0] * batch, 0.0
    for _ in range(rounds):
        ahead = paces.ahead(names) if fair else [1.0] * batch
        rows = []
        for i in range(batch):
            match = Match(3, [0] * 16) if i < batch // 4 and rng.random() < found else None
            rows.append(Row(GREEDY, match, ahead=ahead[i]))
        round = policy.begin(rows)
        while round.goes_on():
            round.saw([0.3] * batch)
        accepted = []
        for row in rows:
            right = 6 if rng.random() < 0.9 else 0
            accepted.append(min(row.drafts, right) if row.copies else 0)
            if row.match:
                policy.learn_copying(row.match, [0] * right + [1])
        policy.settle(round, accepted, [row.drafts for row in rows])
        ms += round.ms
        for i, a in enumerate(accepted):
            tokens[i] += 1 + a
            paces.observe(names[i], 1 + a)
    return [ms / n for n in tokens]


@pytest.mark.parametrize("batch", [4, 8, 16])
def test_those_who_repeat_themselves_do_not_make_the_others_wait(batch):
    plain = costs(**DEAR_ROWS).plain_ms(batch)
    fair, greedy = (served(batch, 0.8, fair) for fair in (True, False))
    mean = lambda times: sum(times) / len(times)  # noqa: E731
    assert mean(fair) <= 1.005 * plain and mean(fair) <= mean(greedy)
    assert max(fair) < 1.12 * plain
    assert max(greedy) > 1.4 * plain  # else this test shows nothing


def test_a_lone_request_is_never_ahead():
    paces = Paces()
    for tokens in (1, 9, 1):
        assert paces.ahead(["a"]) == [1.0]
        paces.observe("a", tokens)


def test_new_requests_stand_at_the_mean_and_those_that_left_are_forgotten():
    paces = Paces()
    paces.ahead(["a", "b"])
    for _ in range(200):
        paces.observe("a", 3)
        paces.observe("b", 1)
    a, b, new = paces.ahead(["a", "b", "c"])
    assert (
        a == pytest.approx(1.5, abs=0.01) and b == pytest.approx(0.5, abs=0.01) and new == pytest.approx(1.0)
    )
    paces.ahead(["b"])
    assert paces.ahead(["a", "b"]) == [1.0, 1.0]
    paces.observe("nobody", 5)

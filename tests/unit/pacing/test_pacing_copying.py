"""Drafts copied from the text: which match is found, when it is used, and what is learned of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfp_vllm.pacing.ngram import LONGEST, Match, latest_longest_match
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Row
from tests.support.pacing_traffic import costs


@given(st.lists(st.integers(0, 3), min_size=0, max_size=40), st.integers(1, 6))
def test_the_match_is_the_latest_of_the_longest(context, most):
    found = latest_longest_match(np.array(context, dtype=np.int32), most)
    end = len(context)
    best: tuple[int, int] | None = None  # (length, position behind it)
    for stop in range(1, end):
        length = 0
        while length < min(stop, LONGEST) and context[stop - 1 - length] == context[end - 1 - length]:
            length += 1
        if length and (best is None or (length, stop) >= best):
            best = (length, stop)
    if best is None:
        assert found is None
        return
    assert found is not None and found.length == best[0]
    follows = list(context)
    for _ in range(most):  # as if the text went on repeating itself
        follows.append(follows[len(follows) - (end - best[1])])
    assert found.tokens == follows[end:]


def test_a_long_match_is_copied_and_needs_no_draft_step():
    policy = DraftPolicy(costs(), longest=8)
    match = Match(LONGEST, list(range(8)))
    for _ in range(20):
        policy.learn_copying(match, match.tokens)
    round = policy.begin([Row(GREEDY, match)])
    assert round.rows[0].copies and round.rows[0].drafts == 8
    assert not round.goes_on()
    assert round.verified == 9 and round.ms == pytest.approx(10 + 0.5 * 8 + 0.5)


def test_copies_that_prove_wrong_are_left_to_the_model():
    policy = DraftPolicy(costs(), longest=8)
    match = Match(3, [1, 2, 3])
    for _ in range(50):
        policy.learn_copying(match, [9])
    round = policy.begin([Row(GREEDY, match)])
    assert not round.rows[0].copies and round.goes_on()


def test_copying_is_learned_from_matches_that_were_not_used():
    policy = DraftPolicy(costs(), longest=8)
    odds = policy.copying[GREEDY]
    before = odds[2], odds[3], odds[4]
    policy.learn_copying(Match(3, [1, 2, 3]), [1, 2, 7])
    after = odds[2], odds[3], odds[4]
    assert after[0] > before[0] and after[1] > before[1] and after[2] < before[2]


def test_one_request_that_copies_leaves_the_draft_steps_to_the_others():
    policy = DraftPolicy(costs(draft_ms=[0.5, 1.0]), longest=8)
    sure = Match(LONGEST, [5] * 8)
    for _ in range(50):
        policy.learn_copying(sure, sure.tokens)
    round = policy.begin([Row(GREEDY, sure), Row(GREEDY)])
    assert [row.copies for row in round.rows] == [True, False]
    while round.goes_on():
        round.saw([0.85, 0.85])
    assert round.rows[0].drafts == 8 and round.rows[1].drafts > 0

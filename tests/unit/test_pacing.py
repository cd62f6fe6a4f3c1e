"""The pacing policy: what it decides, what it learns, and that it never costs more than it may."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sdfp_vllm.pacing.batch import BatchPolicy
from sdfp_vllm.pacing.live import LiveCosts
from sdfp_vllm.pacing.ngram import LONGEST, Match, latest_longest_match
from sdfp_vllm.pacing.odds import Average, Odds, PositionOdds
from sdfp_vllm.pacing.options import Copy, Options, best_copy
from sdfp_vllm.pacing.places import Places
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Round, Row
from sdfp_vllm.pacing.record import CONFIDENCE_EDGES, Pacing, confidence_bin

BINS = len(CONFIDENCE_EDGES) + 1
# (confidence, whether the draft is right) of one draft
Draft = Callable[[random.Random], tuple[float, bool]]


def costs(**changes) -> Pacing:
    """A target of 10 ms a step whose rows cost 0.5 ms each, and a draft of a fifth of it."""
    rows = [1, 64]
    fields = dict(
        rows=rows,
        target_ms=[10.0 + 0.5 * (m - 1) for m in rows],
        draft_ms=[2.0 + 0.1 * (m - 1) for m in rows],
        draft_overhead_ms=0.0,
        round_overhead_ms=0.5,
        acceptance=[0.8] * 8,
        confidence=[0.8] * BINS,
    )
    return Pacing.model_validate(fields | changes)


def simulate(
    policy: DraftPolicy, draft: Draft, rounds: int, batch: int = 1, seed: int = 0
) -> tuple[float, float, list[Round]]:
    """Runs rounds whose drafts come from `draft`; returns (tokens, milliseconds, rounds)."""
    rng = random.Random(seed)
    tokens, ms, done = 0.0, 0.0, []
    for _ in range(rounds):
        rows = [Row(GREEDY) for _ in range(batch)]
        round = policy.begin(rows)
        right: list[list[bool]] = [[] for _ in rows]
        while round.goes_on():
            drawn = [draft(rng) for _ in rows]
            kept = round.saw([confidence for confidence, _ in drawn])
            for seen, (_, ok), keep in zip(right, drawn, kept, strict=True):
                if keep:
                    seen.append(ok)
        accepted = [next((j for j, ok in enumerate(seen) if not ok), len(seen)) for seen in right]
        policy.settle(round, accepted, [len(seen) for seen in right])
        tokens += batch + sum(accepted)
        ms += round.ms
        done.append(round)
    return tokens, ms, done


def steady(chance: float) -> Draft:
    return lambda rng: (0.85, rng.random() < chance)


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


def test_a_clock_corrects_the_plan():
    live = LiveCosts(costs())
    planned = costs().verify_ms(8) + costs().round_overhead_ms
    for i in range(300):
        live.verified(8, 2 * planned)
        live.stepped(1, 3 * costs().step_ms(1))
        if i % 50 == 20:
            live.verified(8, 500 * planned)  # an interruption
    assert live.verify_ms(8) == pytest.approx(2 * planned, rel=0.05)
    assert live.step_ms(1) == pytest.approx(3 * costs().step_ms(1), rel=0.05)
    # What was never measured follows what was.
    assert live.verify_ms(40) == pytest.approx(
        2 * (costs().verify_ms(40) + costs().round_overhead_ms), rel=0.1
    )
    for _ in range(300):
        live.verified(40, costs().verify_ms(40) + costs().round_overhead_ms)
    assert live.verify_ms(8) == pytest.approx(2 * planned, rel=0.05)


def test_a_plan_that_promises_too_much_is_found_out_by_the_clock():
    """More rows than one a request cost three times what the plan says: drafts for a large batch pay by the plan and not in truth."""
    plan = costs(
        target_ms=[10.0, 10.0 + 63 * 0.25], draft_ms=[0.5, 1.0], acceptance=[0.6] * 8, confidence=[0.6] * BINS
    )
    policy = DraftPolicy(plan, longest=8)
    _, _, first = simulate(policy, steady(0.6), 1, batch=16)
    assert first[0].steps > 0
    for _ in range(50):
        for rows, factor in ((16, 1.0), (32, 3.0), (64, 3.0), (128, 3.0)):
            policy.costs.verified(rows, factor * (plan.verify_ms(rows) + plan.round_overhead_ms))
    _, _, rounds = simulate(policy, steady(0.6), 1000, batch=16)
    assert sum(round.steps > 0 for round in rounds[-300:]) < 20


def test_the_longest_draft_is_never_exceeded():
    policy = DraftPolicy(costs(acceptance=[1.0], confidence=[1.0] * BINS), longest=3)
    _, _, rounds = simulate(policy, steady(1.0), 50)
    assert {round.steps for round in rounds} == {3}


# ---------------------------------------------------------------- one length for a batch
def in_batches(policy: BatchPolicy, chance: float, steps: int, batch: int, seed: int = 0) -> list[int]:
    rng, chosen = random.Random(seed), []
    for _ in range(steps):
        k = policy[batch]
        chosen.append(k)
        for _ in range(batch if k else 0):
            policy.observe(k, next((j for j in range(k) if rng.random() > chance), k))
    return chosen


def test_a_batch_gets_the_length_that_is_fastest_for_it():
    policy = BatchPolicy(costs(), [0, 1, 2, 4, 8])
    for chance, batch in ((0.95, 1), (0.6, 4), (0.8, 64)):
        chosen = in_batches(policy, chance, 600, batch)[-100:]
        true = BatchPolicy(costs(acceptance=[chance] * 8), [0, 1, 2, 4, 8])
        rates = {k: true.rate(batch, k) for k in (0, 1, 2, 4, 8)}
        assert sum(rates[k] for k in chosen) / 100 > 0.97 * max(rates.values())


def test_a_batch_that_accepts_nothing_is_hardly_ever_drafted_for_until_it_pays_again():
    policy = BatchPolicy(costs(), [0, 5])
    assert sum(k > 0 for k in in_batches(policy, 0.0, 3000, 2)[-1000:]) in range(1, 20)
    assert min(in_batches(policy, 0.95, 8000, 2)[-100:]) == 5


# ---------------------------------------------------------------- copying
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
    before = policy.copying[2], policy.copying[3], policy.copying[4]
    policy.learn_copying(Match(3, [1, 2, 3]), [1, 2, 7])
    after = policy.copying[2], policy.copying[3], policy.copying[4]
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


def test_whether_places_are_taken_is_not_told_by_a_batch_of_other_requests():
    places = Places()
    before = places.taken
    places.observe(stayed=0, ended=4, came=4)
    places.observe(stayed=4, ended=0, came=4)
    assert places.taken == before
    for _ in range(500):
        places.observe(stayed=3, ended=1, came=5)
    assert places.taken == pytest.approx(1.0, abs=0.01)


def test_nothing_is_tried_that_could_not_pay_were_every_draft_right():
    dear = costs(rows=[1, 64], target_ms=[10.0, 640.0], acceptance=[0.0])
    _, _, rounds = simulate(DraftPolicy(dear, longest=8), steady(1.0), 500, batch=4)
    assert sum(round.steps for round in rounds) == 0


def best_by_enumeration(kinds, most, copies, model, shares, reserve, price, step_ms, rows_ms) -> float:
    """The highest net gain, by the book: what `Options` computes for all numbers of steps at once."""
    nets = []
    for k in range(len(model[0])):
        for copying in (False, True):
            gains, drafts = [], 0
            row_price = price * rows_ms(len(kinds) * k) / (len(kinds) * k) if k else 0.0
            for kind, longest, copy in zip(kinds, most, copies, strict=True):
                own = min(k, longest)
                copies_it = copying and copy.length and copy.worth > model[kind][own] - own * row_price
                gains.append(copy.gain if copies_it else model[kind][own])
                drafts += copy.length if copies_it else own
            worth = sum(  # a token that n requests gain is worth shares[n]
                (high - low) * n * shares[n]
                for n in range(1, len(gains) + 1)
                for high, low in [
                    ([*sorted(gains, reverse=True), 0.0][n - 1], [*sorted(gains, reverse=True), 0.0][n])
                ]
            )
            net = worth - reserve - price * (k * step_ms + rows_ms(drafts))
            nets.append(net if drafts else 0.0)
    return max(nets)


@given(st.data())
def test_the_best_option_is_the_best(data):
    count, longest = data.draw(st.integers(1, 5)), 4
    chances = st.lists(st.floats(0, 1), min_size=longest, max_size=longest)
    model = {kind: [0.0, *np.cumsum(np.cumprod(data.draw(chances)))] for kind in (0, 1)}
    kinds = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    most = data.draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    price, slope, start = (data.draw(st.floats(0.01, 1)) for _ in range(3))

    def rows_ms(n: int) -> float:
        return start * (n > 0) + slope * n

    prices = [price * rows_ms(n) for n in range(longest + 1)]
    matches = data.draw(st.lists(st.none() | st.integers(1, 9), min_size=count, max_size=count))
    copies = [
        best_copy(Match(n, [7] * 4) if n else None, [0.5, 0.7, 0.9], prices, m)
        for n, m in zip(matches, most, strict=True)
    ]
    shares = [0.0, *sorted(data.draw(st.lists(st.floats(0, 1), min_size=count - 1, max_size=count - 1))), 1.0]
    given_ = dict(
        kinds=kinds,
        most=most,
        copies=copies,
        model=model,
        shares=shares,
        reserve=data.draw(st.floats(0, 1)),
        price=price,
        step_ms=0.3,
        rows_ms=rows_ms,
    )
    option = Options(**given_).best()
    assert option.net == pytest.approx(best_by_enumeration(**given_))
    assert len(option.copies) == count and all(
        c in (0, copy.length) for c, copy in zip(option.copies, copies, strict=True)
    )


def test_a_small_gain_is_left_to_batches_whose_places_are_taken():
    """Two tokens of luck more or less, and a round for those behind costs what a small gain brings."""
    slight = costs(
        rows=[1, 64], target_ms=[10.0, 80.0], draft_ms=[2.8, 63.7], acceptance=[0.9], confidence=[0.9] * BINS
    )
    policy = DraftPolicy(slight, longest=1)
    alone, full = policy.begin([Row(GREEDY)]), policy.begin([Row(GREEDY) for _ in range(4)])
    assert alone.goes_on() and not full.goes_on()
    for _ in range(500):
        policy.places.observe(stayed=3, ended=1, came=1)
    assert policy.begin([Row(GREEDY) for _ in range(4)]).goes_on()


def test_the_length_of_a_copy_is_where_its_next_token_no_longer_pays():
    prices = [0.0, 0.5, 1.0, 1.5, 2.0]
    copy = best_copy(Match(2, [1, 2, 3, 4]), [0.9, 0.9, 0.7, 0.6], prices, most=4)
    assert copy == Copy(2, pytest.approx(0.9 + 0.63), pytest.approx(0.53))
    assert best_copy(Match(2, [1, 2, 3, 4]), [0.9, 0.9, 0.7, 0.6], prices, most=1).length == 1
    assert best_copy(Match(1, [1]), [0.4], prices, most=4) == best_copy(None, [1.0], prices, most=4) == Copy()


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


# ---------------------------------------------------------------- parts
def test_a_draft_step_is_padded_to_the_rows_that_are_fastest():
    """As on processors whose matrix products are slow for few rows."""
    pacing = costs(
        rows=[1, 2, 3, 4, 8], target_ms=[9.0, 10.0, 8.0, 7.0, 8.0], draft_ms=[5.0, 6.0, 4.06, 4.0, 5.0]
    )
    assert [pacing.step_rows(batch) for batch in (1, 2, 3, 4, 8, 20)] == [
        4,
        4,
        3,
        4,
        8,
        20,
    ]  # 3: not worth it
    assert pacing.padded_batches() == [4, 4]
    assert pacing.step_ms(1) == pacing.step_ms(2) == 4.0
    assert costs().padded_batches() == []


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


def test_bins():
    assert confidence_bin(0.0) == 0 and confidence_bin(1.0) == BINS - 1
    assert confidence_bin(0.5) == confidence_bin(0.55) == CONFIDENCE_EDGES.index(0.5) + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [2, 64]},
        {"rows": [64, 1]},
        {"target_ms": [1.0]},
        {"draft_ms": [0.0, 1.0]},
        {"target_ms": [float("nan"), 1.0]},
        {"confidence": [0.5]},
        {"acceptance": []},
        {"acceptance": [1.5]},
        {"unknown": 1},
    ],
)
def test_a_record_that_cannot_be_is_refused(changes):
    with pytest.raises(ValidationError):
        costs(**changes)


def test_times_are_linear_between_and_beyond_the_measured_rows():
    pacing = costs(rows=[1, 2, 4], target_ms=[1.0, 2.0, 3.0], draft_ms=[1.0, 1.0, 1.0])
    assert [pacing.verify_ms(m) for m in (1, 2, 3, 4, 6)] == [1.0, 2.0, 2.5, 3.0, 4.0]
    assert costs(rows=[1], target_ms=[2.0], draft_ms=[1.0]).verify_ms(3) == 6.0

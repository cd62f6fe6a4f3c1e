"""What the clock teaches about the costs of the plan."""

from __future__ import annotations

import pytest

from sdfp_vllm.pacing.live import LiveCosts
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Row
from tests.support.pacing_traffic import BINS, costs, simulate, steady


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


def at_context(
    live: LiveCosts, context: float, requests: int, extra: int, seen: float | None = None
) -> tuple[float, float]:
    """A round on a machine where K/V cost what SmolLM2's did: what was expected of it, over what it then takes."""
    plan, seen = costs(), context if seen is None else seen
    live.at(requests, context, seen)
    verify = (
        plan.verify_ms(requests + extra)
        + plan.round_overhead_ms
        + context * (3e-3 * requests + 1.2e-3 * extra)
    )
    step = plan.step_ms(requests) + 3e-3 * seen * requests
    expected = live.verify_ms(requests + extra) / verify, live.step_ms(requests) / step
    live.verified(requests + extra, verify)
    live.stepped(requests, step)
    return expected


def test_long_contexts_are_learned_within_a_few_rounds_and_forgotten_at_once():
    live = LiveCosts(costs())
    for i in range(20):
        at_context(live, 300.0, 1, i % 5)
    assert at_context(live, 300.0, 1, 3) == pytest.approx((1.0, 1.0), rel=0.05)
    first = at_context(live, 8000.0, 1, 3)
    assert max(first) < 0.7  # nothing had said what K/V cost
    for i in range(6):
        at_context(live, 8000.0, 1, 2 + i % 3)
    assert at_context(live, 8000.0, 1, 3) == pytest.approx((1.0, 1.0), rel=0.15)
    # Another length is known from the start, and the first one again.
    assert at_context(live, 4000.0, 1, 3) == pytest.approx((1.0, 1.0), rel=0.2)
    assert at_context(live, 300.0, 1, 3) == pytest.approx((1.0, 1.0), rel=0.3)


def test_an_error_of_a_long_context_is_sooner_of_what_all_rows_share():
    """K/V are read once for all rows of a request. Put down to the rows, one long verification made all others look dear."""
    live = LiveCosts(costs())
    live.at(1, 4000.0, 4000.0)
    live.verified(6, costs().verify_ms(6) + costs().round_overhead_ms + 40.0)
    assert live._read.first > 5 * live._read.more > 0


def test_a_step_with_a_window_costs_what_it_sees():
    live = LiveCosts(costs())
    for i in range(60):
        at_context(live, 8000.0, 1, i % 5, seen=8000.0 if i % 2 else 500.0)
    assert at_context(live, 8000.0, 1, 3, seen=500.0)[1] == pytest.approx(1.0, rel=0.2)
    assert at_context(live, 8000.0, 1, 3, seen=8000.0)[1] == pytest.approx(1.0, rel=0.2)


def test_without_a_context_nothing_is_laid_to_it():
    known, blind = LiveCosts(costs()), LiveCosts(costs())
    for i in range(50):
        known.at(4, 0.0, 0.0)
        for live in (known, blind):
            live.verified(4 + i % 8, 30.0 + i % 3)
            live.stepped(4, 5.0 + i % 2)
    assert [known.verify_ms(n) for n in range(1, 40)] == [blind.verify_ms(n) for n in range(1, 40)]
    assert known.step_ms(4) == blind.step_ms(4)


def test_long_contexts_shorten_drafts_where_a_row_costs_more():
    """The same chances: with 8,000 tokens of context a draft step costs as much as what it saves."""
    plan = costs(target_ms=[10.0, 20.0], draft_ms=[4.0, 8.0], acceptance=[0.8] * 8, confidence=[0.8] * BINS)
    policy = DraftPolicy(plan, longest=8)
    _, _, short = simulate(policy, steady(0.8), 100)
    for i in range(100):
        policy.costs.at(1, 8000.0, 8000.0)
        policy.costs.verified(1 + i % 4, plan.verify_ms(1 + i % 4) + 8.0 * (1 + i % 4))
        policy.costs.stepped(1, 24.0)
    assert sum(r.steps for r in short) / 100 > 1.0
    assert policy.begin([Row(GREEDY)], 8000.0).first_step is False
    assert policy.begin([Row(GREEDY)], 200.0).first_step is True

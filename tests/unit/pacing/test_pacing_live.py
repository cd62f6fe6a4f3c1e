"""What the clock teaches about the costs of the plan."""

from __future__ import annotations

import pytest

from sdfp_vllm.pacing.live import LiveCosts
from sdfp_vllm.pacing.policy import DraftPolicy
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

"""Whose drafts see past the window."""

from __future__ import annotations

import random

import pytest

from sdfp_vllm.pacing.live import LiveCosts
from sdfp_vllm.pacing.sights import Sights
from tests.support.pacing_traffic import costs

CONTEXT, SHOWN = 8000, 516
READ_MS = 5e-4  # a token of context: at this length a step of the target takes 14 ms, of the draft 6, or 2 with the window


def live(read_ms: float = READ_MS) -> LiveCosts:
    """Costs of a machine that has met long contexts."""
    known = LiveCosts(costs())
    for i in range(30):
        known.at(1, CONTEXT, CONTEXT)
        extra = i % 4
        rows_ms = costs().verify_ms(1 + extra) + costs().round_overhead_ms
        known.verified(1 + extra, rows_ms + CONTEXT * read_ms * (1 + extra / 4))
        known.stepped(1, costs().step_ms(1) + CONTEXT * read_ms)
    return known


def follow(
    sights: Sights,
    requests: dict[str, tuple[float, float]],
    rounds: int,
    known: LiveCosts,
    context: int = CONTEXT,
    seed: int = 0,
) -> dict[str, float]:
    """The share of rounds that each request saw all in; given are its chances with the window and without."""
    rng, count = random.Random(seed), dict.fromkeys(requests, 0)
    for _ in range(rounds):
        n = len(requests)
        chosen = sights.choose(list(requests), [context] * n, [min(context, SHOWN)] * n, known)
        for (name, chances), whole in zip(requests.items(), chosen, strict=True):
            right = next((j for j in range(4) if rng.random() >= chances[whole]), 4)
            sights.observe(name, whole, right, 4)
            count[name] += whole
    return {name: n / rounds for name, n in count.items()}


def test_each_request_gets_the_sight_that_is_faster_for_it():
    """One misses what the window hides, one does not, and one is hard to foresee whatever is seen of it."""
    sights = Sights(0.9, 8)
    requests = {"misses": (0.3, 0.95), "does not": (0.93, 0.95), "hard": (0.2, 0.2)}
    known = live(READ_MS / 5)  # of a batch each pays its own reading, and a third of the weights'
    follow(sights, requests, 40, known)
    late = follow(sights, requests, 300, known, seed=1)
    assert late["misses"] > 0.8
    assert late["does not"] < 0.1
    assert late["hard"] < 0.4


def test_a_text_that_changes_is_followed_both_ways():
    sights = Sights(0.9, 8)
    for chances, least, most in (((0.93, 0.95), 0, 0.1), ((0.3, 0.95), 0.75, 1), ((0.95, 0.95), 0, 0.25)):
        follow(sights, {"a": chances}, 300, live())  # until it is known
        assert least <= follow(sights, {"a": chances}, 200, live(), seed=2)["a"] <= most


def test_where_reading_is_dear_it_is_not_done_for_the_sake_of_acceptance():
    """A draft step that reads all costs as much as a step of the target: right ones gain nothing."""
    dear = live(20 * READ_MS)
    sights = Sights(0.9, 8)
    follow(sights, {"a": (0.6, 0.95)}, 40, dear)
    assert follow(sights, {"a": (0.6, 0.95)}, 200, dear, seed=1)["a"] < 0.1


def test_where_reading_is_cheap_little_is_missed_to_see_all():
    """On a machine where K/V cost a tenth, a small loss of acceptance is not worth the window."""
    cheap = live(READ_MS / 10)
    sights = Sights(0.9, 8)
    follow(sights, {"a": (0.7, 0.95)}, 40, cheap)
    assert follow(sights, {"a": (0.7, 0.95)}, 200, cheap, seed=1)["a"] > 0.8


def test_contexts_that_the_window_shows_whole_are_not_asked():
    sights = Sights(0.9, 8)
    assert follow(sights, {"a": (0.1, 0.9)}, 100, live(), context=SHOWN)["a"] == 0


def test_requests_that_left_are_forgotten():
    sights = Sights(0.9, 8)
    follow(sights, {"a": (0.3, 0.95)}, 60, live())
    assert sights.choose(["a"], [CONTEXT], [SHOWN], live()) == [True]
    sights.choose(["b"], [CONTEXT], [SHOWN], live())
    assert list(sights._requests) == ["b"]


def test_shares_are_of_one_request():
    """What a batch takes, over its requests, where all have the same context."""
    known = live()
    known.at(4, CONTEXT, CONTEXT)
    verify, draft = known.shares(4).ms(CONTEXT, CONTEXT)
    assert 4 * verify == pytest.approx(known.verify_ms(4), rel=0.02)
    assert 4 * draft == pytest.approx(known.step_ms(4) + known.verify_ms(8) - known.verify_ms(4), rel=0.02)
    assert known.shares(4).ms(CONTEXT, SHOWN)[1] < draft - 0.9 * READ_MS * (CONTEXT - SHOWN)

"""Drafts that follow the traffic, and drafts copied from the context: the same text, and the right context."""

from __future__ import annotations

import numpy as np
import pytest

from sdfp_vllm.engine.v1 import pacer as pacer_module
from sdfp_vllm.plan.window import DraftWindow
from tests.support.engines import (
    assert_identical,
    engine,
    pacing_by_hand,
    runner,
    spec_counters,
    tokens,
    write_plan,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def paced_plan(target, kept, tmp_path_factory):
    return write_plan(target, tmp_path_factory.mktemp("paced"), kept, k=3, pacing=pacing_by_hand())


@pytest.fixture(scope="module")
def copy_heavy(prompts):
    """Prompts that say everything twice, so that their continuation stands in the context."""
    return [(p[:60] + p[:60] + p[:20]) for p in prompts[:16]]


@pytest.fixture(scope="module")
def plain_copies(target, copy_heavy):
    with engine(target) as plain:
        return tokens(plain, copy_heavy, max_tokens=48)


@pytest.fixture(scope="module")
def llm(target, paced_plan, plain_copies):
    with engine(target, {"method": "sdfp", "model": paced_plan}, max_num_batched_tokens=128) as llm:
        runner(llm).drafter.pacer.timed = False  # by the costs above, whatever the machine does
        yield llm


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_same_tokens_and_every_kind_of_draft(llm, prompts, plain_tokens, batch):
    """In chunks of 128 tokens: some requests are in the middle of their prefill while others draft."""
    tally = runner(llm).drafter.pacer.tally
    before = tally.copied_drafts, tally.model_drafts
    assert_identical(tokens(llm, prompts, batch=batch), plain_tokens)
    assert tally.copied_drafts > before[0] and tally.model_drafts > before[1]


def test_copies_speak_for_themselves(llm, copy_heavy, plain_copies):
    before, tally = spec_counters(llm), runner(llm).drafter.pacer.tally
    copied = tally.copied_drafts
    assert_identical(tokens(llm, copy_heavy, batch=1, max_tokens=48), plain_copies)
    drafts = spec_counters(llm)["num_drafts"] - before["num_drafts"]
    accepted = spec_counters(llm)["num_accepted_tokens"] - before["num_accepted_tokens"]
    assert tally.copied_drafts - copied > 100
    assert accepted / drafts > 2, "a text said twice is copied in long stretches"


def test_the_context_is_the_text_so_far(llm, prompts, monkeypatch):
    seen: list[list[int]] = []

    def remember(context: np.ndarray, most: int):
        seen.append(context.tolist())
        return None

    monkeypatch.setattr(pacer_module, "latest_longest_match", remember)
    chosen = prompts[:6]
    answers = tokens(llm, chosen, max_tokens=24)
    texts = [[*p, *a[0]] for p, a in zip(chosen, answers, strict=True)]
    shortest = min(map(len, chosen))
    assert len(seen) > len(chosen)
    for context in seen:
        assert len(context) > shortest
        # The last may hold more than was asked for: drafts accepted past the end.
        assert any(context[: len(text)] == text[: len(context)] for text in texts)
    for prompt in chosen:  # from the first sampled token on
        assert any(len(context) == len(prompt) + 1 for context in seen)


def test_costs_know_how_long_contexts_are_and_what_a_window_leaves(llm, prompts, monkeypatch):
    drafter = runner(llm).drafter
    asked: list[tuple[int, float, float]] = []
    begin = drafter.pacer.policy.begin

    def remember(rows, context, seen):
        asked.append((len(rows), context, seen))
        return begin(rows, context, seen)

    monkeypatch.setattr(drafter.pacer.policy, "begin", remember)
    long, short = (next(p for p in prompts if lo < len(p) < hi) for lo, hi in ((60, 128), (8, 40)))
    (answer,) = tokens(llm, [long], max_tokens=8)[0]
    # After the prompt and its first token, and so on to the last round that drafts.
    lengths = [context for _, context, _ in asked]
    assert lengths[0] == len(long) + 1 and lengths == sorted(lengths)
    assert lengths[-1] <= len(long) + len(answer)
    assert all(seen == context for _, context, seen in asked)
    asked.clear()
    monkeypatch.setattr(drafter, "window", DraftWindow(sinks=4, last=30))
    tokens(llm, [long, short], max_tokens=4)
    both = [(context, seen) for count, context, seen in asked if count == 2]
    assert both and both[0] == ((len(long) + len(short) + 2) / 2, (34 + min(len(short) + 1, 34)) / 2)


def test_a_request_with_a_seed_gets_the_plans_fixed_length(llm, prompts):
    rounds = runner(llm).drafter.pacer.tally.rounds.total()
    first, again = (tokens(llm, prompts[:2], temperature=1.0, seed=7) for _ in range(2))
    assert first == again
    assert runner(llm).drafter.pacer.tally.rounds.total() == rounds


def test_a_length_by_the_user_is_fixed(target, paced_plan, prompts, plain_tokens):
    with engine(target, {"method": "sdfp", "model": paced_plan, "num_speculative_tokens": 2}) as llm:
        assert runner(llm).drafter.pacer is None
        assert_identical(tokens(llm, prompts[:8]), plain_tokens[:8])
        assert len(spec_counters(llm)["num_accepted_tokens_per_pos"]) == 2


def test_where_nothing_is_accepted_it_stops_drafting(target, kept, tmp_path, prompts, plain_tokens):
    """Verification of a row dearer than a step: no draft can pay."""
    dear = pacing_by_hand(row_ms=40.0)
    plan = write_plan(target, tmp_path, kept, k=3, pacing=dear)
    with engine(target, {"method": "sdfp", "model": plan}) as llm:
        assert_identical(tokens(llm, prompts), plain_tokens)
        tally = runner(llm).drafter.pacer.tally
        steps = sum(steps * count for (_, _, steps), count in tally.rounds.items())
        assert steps < 0.2 * tally.rounds.total()
        assert tally.copied_drafts == 0

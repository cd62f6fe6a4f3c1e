"""Draft steps run with more rows than requests, where the plan found these faster: the same drafts, the same text."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.support.engines import (
    assert_identical,
    engine,
    pacing_by_hand,
    runner,
    spec_counters,
    tokens,
    write_plan,
)
from tests.support.offline_drafts import NEW, K, assert_drafts_are_offline, drafts_of

pytestmark = pytest.mark.engine
KEPT = [0, 5, 10, 15]
# One to three requests are run as four rows.
PACING = pacing_by_hand(
    rows=[1, 2, 3, 4, 64], target_ms=[10.0, 10.0, 10.0, 10.0, 40.0], draft_ms=[1.5, 1.5, 1.5, 1.0, 2.0]
)


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "paced"])
def test_padding_changes_no_draft_and_no_token(target, prompts, plain_tokens, tmp_path, adaptive):
    plan = write_plan(target, tmp_path, KEPT, K, pacing=PACING)
    settings = {"method": "sdfp", "model": plan, "adaptive": adaptive, "ngram": False}
    some = [p for p in prompts if 8 <= len(p) < 100][:6]
    want = [[plain_tokens[prompts.index(p)][0][:NEW]] for p in some]
    with engine(target, settings) as llm:
        drafter = runner(llm).drafter
        forward, rows = drafter._forward, []  # (requests at most, rows run)

        def spy(metadata, slots, padded, *args):
            rows.append((batch, padded))
            return forward(metadata, slots, padded, *args)

        drafter._forward = spy
        for batch in (1, 2, 3, 6):
            assert_identical(tokens(llm, some, batch=batch, max_tokens=NEW), want)
        assert {run for most, run in rows if most < 4} == {4}
        assert (6, 6) in rows
        assert spec_counters(llm)["num_accepted_tokens"] > 0
        if not adaptive:
            answers, rounds = drafts_of(llm, some[:4])
            stack = DecoderStack(load_target(target, torch.float32))
            assert_drafts_are_offline(
                stack, KEPT, None, some[:4], answers, rounds, other_than=([0, 15], None)
            )

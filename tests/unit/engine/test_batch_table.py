"""The plan's draft lengths by batch size, in the form vLLM's scheduler takes."""

import pytest

from sdfp_vllm.engine.drafting import ANY_BATCH, batch_table
from tests.support.plans import make_plan


def test_ranges_touch_and_the_last_has_no_end():
    plan = make_plan(draft_tokens_by_batch=[(1, 2), (8, 1), (32, 0)])
    assert batch_table(plan) == [(1, 1, 2), (2, 8, 1), (9, ANY_BATCH, 0)]


@pytest.mark.parametrize("table", [[], [(1, 2), (8, 2)]])
def test_one_length_needs_no_table(table):
    assert batch_table(make_plan(draft_tokens_by_batch=table)) is None

"""The draft's head over more rows than it is asked for, where these are faster."""

from __future__ import annotations

import pytest
import torch

from sdfp_vllm.engine.draft.head import padded


@pytest.mark.parametrize("count, run", [(0, 0), (1, 4), (2, 4), (3, 3), (4, 4), (9, 9)])
def test_rows_are_added_for_the_product_and_left_out_of_the_answer(count, run):
    weight, asked = torch.randn(8, 5), []

    def compute(hidden: torch.Tensor) -> torch.Tensor:
        asked.append(len(hidden))
        return hidden @ weight

    hidden = torch.randn(count, 8)
    logits = padded(compute, [4, 4, 3])(hidden)
    assert asked == [run]
    torch.testing.assert_close(logits, hidden @ weight)


def test_without_faster_rows_the_head_gets_what_it_is_given():
    hidden = torch.randn(1, 8)
    assert padded(lambda given: given, [])(hidden) is hidden

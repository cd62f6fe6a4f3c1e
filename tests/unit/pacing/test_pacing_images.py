"""Copies beside images: their places are neither matched nor copied."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfp_vllm.engine.v1.media import without_media
from sdfp_vllm.pacing.ngram import NO_TEXT, latest_longest_match


def feature(offset: int, length: int) -> SimpleNamespace:
    return SimpleNamespace(mm_position=SimpleNamespace(offset=offset, length=length))


@given(st.lists(st.sampled_from([0, 1, 2, NO_TEXT]), min_size=2, max_size=40), st.integers(1, 6))
def test_a_match_is_text_and_is_followed_by_text(context, most):
    found = latest_longest_match(np.array(context, dtype=np.int32), most)
    if found is None:
        # Nothing but an image follows the last token wherever it stood before.
        end = len(context) - 1
        assert context[end] == NO_TEXT or all(
            context[i + 1] == NO_TEXT for i in range(end) if context[i] == context[end]
        )
        return
    assert 1 <= len(found.tokens) <= most and NO_TEXT not in found.tokens
    assert NO_TEXT not in context[len(context) - found.length :]


@pytest.mark.parametrize(
    ("context", "tokens"),
    [
        ([5, 6, NO_TEXT, NO_TEXT, 5], [6]),  # up to the image
        ([5, NO_TEXT, 7, 5], None),  # an image follows
        ([5, 8, 5, NO_TEXT, 7, 5], [8, 5]),  # one follows the latest, text the one before
        ([NO_TEXT, 5, 6, NO_TEXT, 5], [6]),  # two images alike are no match
    ],
)
def test_by_hand(context, tokens):
    found = latest_longest_match(np.array(context), 4)
    assert (found and found.tokens) == tokens


def test_places_of_images_are_found_in_what_is_left_of_a_prompt():
    context = np.arange(10)
    assert without_media(context.copy(), [feature(2, 3), feature(8, 1)]).tolist() == [
        0, 1, NO_TEXT, NO_TEXT, NO_TEXT, 5, 6, 7, NO_TEXT, 9,
    ]  # fmt: skip
    assert without_media(context.copy(), [feature(2, 3)], begin=4).tolist() == [NO_TEXT, *range(1, 10)]
    assert without_media(context.copy(), [feature(2, 3)], begin=9).tolist() == list(range(10))
    assert without_media(context.copy(), None).tolist() == list(range(10))

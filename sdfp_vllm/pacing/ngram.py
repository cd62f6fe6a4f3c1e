"""Drafts from the context itself: what followed the last time its end was seen (prompt lookup)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LONGEST = 16  # a match of more tokens is as good as one of these
NO_TEXT = -1  # stands in a context where an image is: neither matched nor copied


@dataclass(frozen=True)
class Match:
    """`length` tokens at the end of a context stand earlier in it too, there followed by `tokens`."""

    length: int
    tokens: list[int]


def latest_longest_match(context: np.ndarray, most: int, longest: int = LONGEST) -> Match | None:
    """Finds the longest suffix of `context` that stands earlier in it; among equals the latest.

    Args:
        context: int [T] token ids, NO_TEXT where no text is.
        most: Tokens wanted after the match.
        longest: Suffixes are not followed further than this.

    Returns:
        None where the last token is new to the context, or no text follows where it stands; of what follows the
        match, the text up to an image.
    """
    end = len(context) - 1
    if end < 1 or most < 1 or context[end] == NO_TEXT:
        return None
    ends = np.flatnonzero(context[:end] == context[end])
    ends = ends[context[ends + 1] != NO_TEXT]
    length, best = 1, ends
    while len(best) and length < longest and end >= length and context[end - length] != NO_TEXT:
        ends = best[best >= length]
        ends = ends[context[ends - length] == context[end - length]]
        if not len(ends):
            break
        best, length = ends, length + 1
    if not len(best):
        return None
    back = end - int(best[-1])
    tokens = context[len(context) - back :][:most].tolist()
    if NO_TEXT in tokens:
        return Match(length, tokens[: tokens.index(NO_TEXT)])
    while len(tokens) < most:  # a loop shorter than what is wanted goes on
        tokens.append(tokens[-back])
    return Match(length, tokens)

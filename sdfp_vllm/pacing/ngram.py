"""Drafts from the context itself: what followed the last time its end was seen (prompt lookup)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LONGEST = 16  # a match of more tokens is as good as one of these


@dataclass(frozen=True)
class Match:
    """`length` tokens at the end of a context stand earlier in it too, there followed by `tokens`."""

    length: int
    tokens: list[int]


def latest_longest_match(context: np.ndarray, most: int, longest: int = LONGEST) -> Match | None:
    """Finds the longest suffix of `context` that stands earlier in it; among equals the latest.

    Args:
        context: int [T] token ids.
        most: Tokens wanted after the match.
        longest: Suffixes are not followed further than this.

    Returns:
        None where the last token is new to the context.
    """
    end = len(context) - 1
    if end < 1 or most < 1:
        return None
    ends = np.flatnonzero(context[:end] == context[end])
    length, best = 1, ends
    while len(best) and length < longest:
        ends = best[best >= length]
        ends = ends[context[ends - length] == context[end - length]]
        if not len(ends):
            break
        best, length = ends, length + 1
    if not len(best):
        return None
    back = end - int(best[-1])
    tokens = context[len(context) - back :][:most].tolist()
    while len(tokens) < most:  # a loop shorter than what is wanted goes on
        tokens.append(tokens[-back])
    return Match(length, tokens)

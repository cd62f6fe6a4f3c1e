"""The options of a round: the one that is computed to be the best is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdfp_vllm.pacing.ngram import Match
from sdfp_vllm.pacing.options import Copy, Options, best_copy


def best_by_enumeration(
    kinds, most, copies, worths, model, shares, reserve, price, step_ms, rows_ms
) -> float:
    """The highest net gain, by the book: what `Options` computes for all numbers of steps at once."""
    nets = []
    for k in range(len(model[0])):
        for copying in (False, True):
            gains, drafts = [], 0
            row_price = price * rows_ms(len(kinds) * k) / (len(kinds) * k) if k else 0.0
            for kind, longest, copy, w in zip(kinds, most, copies, worths, strict=True):
                own = min(k, longest)
                copies_it = copying and copy.length and copy.worth > w * model[kind][own] - own * row_price
                gains.append(copy.gain if copies_it else w * model[kind][own])
                drafts += copy.length if copies_it else own
            worth = sum(  # a token that n requests gain is worth shares[n]
                (high - low) * n * shares[n]
                for n in range(1, len(gains) + 1)
                for high, low in [
                    ([*sorted(gains, reverse=True), 0.0][n - 1], [*sorted(gains, reverse=True), 0.0][n])
                ]
            )
            net = worth - reserve - price * (k * step_ms + rows_ms(drafts))
            nets.append(net if drafts else 0.0)
    return max(nets)


@given(st.data())
def test_the_best_option_is_the_best(data):
    count, longest = data.draw(st.integers(1, 5)), 4
    chances = st.lists(st.floats(0, 1), min_size=longest, max_size=longest)
    model = {kind: [0.0, *np.cumsum(np.cumprod(data.draw(chances)))] for kind in (0, 1)}
    kinds = data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
    most = data.draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    price, slope, start = (data.draw(st.floats(0.01, 1)) for _ in range(3))

    def rows_ms(n: int) -> float:
        return start * (n > 0) + slope * n

    prices = [price * rows_ms(n) for n in range(longest + 1)]
    matches = data.draw(st.lists(st.none() | st.integers(1, 9), min_size=count, max_size=count))
    worths = data.draw(st.lists(st.floats(0.1, 4), min_size=count, max_size=count))
    copies = [
        best_copy(Match(n, [7] * 4) if n else None, [0.5, 0.7, 0.9], prices, m, w)
        for n, m, w in zip(matches, most, worths, strict=True)
    ]
    shares = [0.0, *sorted(data.draw(st.lists(st.floats(0, 1), min_size=count - 1, max_size=count - 1))), 1.0]
    given_ = dict(
        kinds=kinds,
        most=most,
        copies=copies,
        worths=worths,
        model=model,
        shares=shares,
        reserve=data.draw(st.floats(0, 1)),
        price=price,
        step_ms=0.3,
        rows_ms=rows_ms,
    )
    option = Options(**given_).best()
    assert option.net == pytest.approx(best_by_enumeration(**given_))
    assert len(option.copies) == count and all(
        c in (0, copy.length) for c, copy in zip(option.copies, copies, strict=True)
    )


def test_the_length_of_a_copy_is_where_its_next_token_no_longer_pays():
    prices = [0.0, 0.5, 1.0, 1.5, 2.0]
    copy = best_copy(Match(2, [1, 2, 3, 4]), [0.9, 0.9, 0.7, 0.6], prices, most=4)
    assert copy == Copy(2, pytest.approx(0.9 + 0.63), pytest.approx(0.53))
    assert best_copy(Match(2, [1, 2, 3, 4]), [0.9, 0.9, 0.7, 0.6], prices, most=1).length == 1
    assert best_copy(Match(1, [1]), [0.4], prices, most=4) == best_copy(None, [1.0], prices, most=4) == Copy()

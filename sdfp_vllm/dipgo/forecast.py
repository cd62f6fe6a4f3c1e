"""What stands in for a value that is not computed: a combination of the last values that were.

With values F0, F1, F2 computed last at the steps s0 > s1 > s2, and k = t - s0, it is at step t

    F0 + p1(k) D1 + p2(k) / 2 D2,    D1 = (F0 - F1) / (s0 - s1),    D2 = (D1 - (F1 - F2) / (s1 - s2)) / (s0 - s1)

up to the order asked for. Taylor: p_n(k) = k^n, which is TaylorSeer (arXiv 2503.06923), for unequal distances as in diffusers'
`taylorseer_cache.py`. Hermite: p_n(k) = c^n H_n(c k) with H_1(x) = 2 x, H_2(x) = 4 x^2 - 2 and c = 0.5, which is HiCache
(arXiv 2508.16984). With fewer values than an order needs, the order is that of the values there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Forecasts = NDArray[np.str_]  # (steps, units): a letter of KINDS each

KINDS = {"0": 0, "1": 1, "2": 2, "h": 1, "H": 2}
"""The order of each kind, by its letter in a plan: 0 the last value, 1 and 2 Taylor's, h and H Hermite's of order 1 and 2."""

_CONTRACTION = 0.5


def slopes(kind: str, step: int, computed: Sequence[int]) -> list[float]:
    """The forecast of `kind` at `step`, as what is added to F0: coefficients of F0 - F1 and of F1 - F2, as many as it takes.

    Args:
        computed: The steps of the values there are, latest first.
    """
    order = min(KINDS[kind], len(computed) - 1)
    if order == 0:
        return []
    k, a = step - computed[0], computed[0] - computed[1]
    x = _CONTRACTION * k
    first = k if kind in "12" else 2 * _CONTRACTION * x
    if order == 1:
        return [first / a]
    second = k * k if kind in "12" else _CONTRACTION**2 * (4 * x * x - 2)
    b = computed[1] - computed[2]
    return [first / a + second / (2 * a * a), -second / (2 * a * b)]


def coefficients(kind: str, step: int, computed: Sequence[int]) -> list[float]:
    """The same as coefficients of F0, F1 and F2, which sum to 1."""
    alpha, beta = (*slopes(kind, step, computed), 0.0, 0.0)[:2]
    return [1 + alpha, beta - alpha, -beta]

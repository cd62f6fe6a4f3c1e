"""Times at row counts that were not measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

# Rows are added where they save at least this share of the time: less may be a disturbance of the measurement.
_WORTH_PADDING = 0.03


def at_rows(rows: Sequence[int], values: Sequence[float], count: int) -> float:
    """The value at `count` rows, linear between and beyond the measured `rows`, ascending from 1."""
    if len(rows) == 1:
        return values[0] * count
    right = min(max(bisect_left(rows, count), 1), len(rows) - 1)
    (x0, x1), (y0, y1) = rows[right - 1 : right + 1], values[right - 1 : right + 1]
    return y0 + (y1 - y0) * (count - x0) / (x1 - x0)


def fastest_rows(rows: Sequence[int], milliseconds: Callable[[int], float], batch: int) -> int:
    """Rows to run `batch` rows with, the others padding: matrix products may be faster over a few more rows than over few."""
    own = milliseconds(batch)
    best = min((m for m in rows if m > batch), key=milliseconds, default=batch)
    return best if milliseconds(best) < (1 - _WORTH_PADDING) * own else batch

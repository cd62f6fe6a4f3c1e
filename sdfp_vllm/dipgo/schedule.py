"""Schedules of whole steps: which steps run, by dynamic programming on what forecasts err by.

A step that is left out is forecast from the two that ran last, h and i, until j runs again. Taken alone, what these forecasts err
by depends on h, i and j and on no other step, so that the best of all schedules with so many steps is found exactly (the idea
of DPCache, arXiv 2602.22654). Closing gates one by one cannot: it never moves a step that is there. Errors are those of the denoiser's outputs
(outputs.py), or of the images as they are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdfp_vllm.dipgo.forecast import KINDS
from sdfp_vllm.dipgo.outputs import Errors
from sdfp_vllm.dipgo.prediction import Surrogate
from sdfp_vllm.dipgo.task import Pattern, Task

_MOST_STEPS = 100  # for which the programme's table, of three steps, is of a size to be filled
_LONGEST = 16  # steps between two that run; more where the budget asks for it


def predicted(surrogate: Surrogate, power: float) -> Errors:
    """What images err by, as an additive prediction has it.

    Args:
        power: Of the squared error: 1 is right for errors that are independent, 0.5 for such as add up.
    """
    whole = surrogate.whole()
    return lambda step, kind, computed: whole.error(0, step, kind, computed)[1] ** power


def scheduled(task: Task, errors: Errors, kinds: str, first: int = 1) -> Pattern | None:
    """The best schedule within the budget, each step left out forecast by the best of `kinds` of an order up to 1.

    Args:
        first: So many first steps run; of a later denoiser its first alone.

    Returns:
        None where the budget does not hold the steps that have to run, or a generation has more than 100.
    """
    steps, units = task.sampler.calls, len(task.layout.units)
    forced = sorted({*range(min(first, steps)), *task.stages})
    count = max((n for n in range(1, steps + 1) if task.fits(_rows(range(n), steps, units))), default=0)
    if count < len(forced) or steps > _MOST_STEPS:
        return None
    kinds = "".join(k for k in kinds if KINDS[k] < 2) or "0"
    cost, chosen = _costs(errors, steps, task.stages, kinds, max(_LONGEST, 4 * steps // count))
    runs = best_path(cost, count, forced)
    pattern = Pattern.of(_rows(runs, steps, units), kinds[0])
    for step in range(steps):
        if step not in runs:
            pattern.kinds[step] = chosen[_values(step, runs, task.stages)][step]
    return pattern


def best_path(cost: NDArray[np.float64], count: int, forced: Sequence[int] = (0,)) -> list[int]:
    """The `count` steps, step 0 among them, whose costs sum to least.

    Args:
        cost: Of steps h, i, j that run one after the other, at [h + 1, i + 1, j + 1]: (steps + 2,) * 3. Index 0 in place of
            h + 1 says that nothing ran before i, the last in place of j + 1 that nothing runs after it. What cannot be is infinite.
        forced: Steps that run whatever they cost; at most `count`.
    """
    cost = cost.copy()
    for step in forced:
        cost[:, : step + 1, step + 2 :] = np.inf  # none is passed over
    # The least cost of all ways to the last two steps that ran.
    reached = np.full(cost.shape[:2], np.inf)
    reached[0, 1] = 0.0
    came: list[NDArray[np.int64]] = []
    for _ in range(count - 1):
        through = reached[:, :, None] + cost
        through[:, :, -1] = np.inf  # nothing follows the end
        came.append(through.argmin(0))
        reached = through.min(0)
    total = reached + cost[:, :, -1]
    before, last = (int(n) for n in np.unravel_index(total.argmin(), total.shape))
    path = [last]
    for origins in reversed(came):
        path.append(before)
        before, last = int(origins[before, last]), before
    return [node - 1 for node in reversed(path)]


def _costs(
    errors: Errors, steps: int, stages: Sequence[int], kinds: str, longest: int
) -> tuple[NDArray[np.float64], dict[tuple[int, ...], dict[int, str]]]:
    """`best_path`'s costs, and the best forecast of a step by the steps of its values, latest first.

    Args:
        longest: Distance of two steps that run one after the other.
    """
    cost = np.full((steps + 2,) * 3, np.inf)
    chosen: dict[tuple[int, ...], dict[int, str]] = {}
    for i in range(steps):
        for h in range(max(0, i - longest), i) if i else (-1,):
            values = _values(i + 1, (h, i), stages) if i + 1 not in stages else (i,)
            best = chosen.setdefault(values, {})
            summed = 0.0
            for j in range(i + 1, min(steps, i + longest) + 1):
                cost[h + 1, i + 1, j + 1] = summed
                if j == steps or j in stages:
                    if j < steps:
                        break  # it runs, and what ran before is another denoiser's
                    continue
                of_kind = {kind: errors(j, kind, values) for kind in kinds}
                best[j] = min(of_kind, key=lambda kind: of_kind[kind])
                summed += of_kind[best[j]]
    return cost, chosen


def _values(step: int, runs: Sequence[int], stages: Sequence[int]) -> tuple[int, ...]:
    """The last two of `runs` before a step, latest first, of the denoiser whose turn it is."""
    begin = max((s for s in stages if s <= step), default=0)
    return tuple(sorted((s for s in runs if begin <= s < step), reverse=True)[:2])


def _rows(runs: Sequence[int], steps: int, units: int) -> NDArray[np.bool_]:
    gates = np.zeros((steps, units), dtype=bool)
    gates[list(runs)] = True
    return gates

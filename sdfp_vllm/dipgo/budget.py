"""From learned scores to the gates of a given budget (DiP-GO's post-processing)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from sdfp_vllm.dipgo.cost import Cost, CostName
from sdfp_vllm.dipgo.layout import Gates, Layout
from sdfp_vllm.dipgo.plan import DipgoPlan, rows
from sdfp_vllm.errors import SdfpError

TOLERANCE = 0.0125  # of the full run's cost, as in the paper


def gates_at_budget(
    scores: NDArray, budget: float, layout: Layout, cost: Cost, reuse: str, stages: Sequence[int] = (0,)
) -> Gates:
    """Keeps the gates of the highest scores, closed under dependency, for at most about `budget` of the cost.

    Bisects the threshold over the scores that occur. A higher threshold opens a subset, and
    closure is monotone, so the share falls with it. Returns the gates within `TOLERANCE` of the
    budget if the scores have such a threshold, else the largest below it; the first call stays open.

    Args:
        scores: (calls, units), in [0, 1].
        budget: Share of the full run's cost, in (0, 1].
        stages: The steps at which a denoiser takes over; they stay open.
    """

    def at(threshold: float) -> Gates:
        gates = scores >= threshold
        gates[list(stages)] = True
        return layout.closure(gates, reuse)

    thresholds = np.append(np.unique(scores), np.inf)  # ascending, so shares descend
    low, high = 0, len(thresholds) - 1  # the answer is in [low, high]; inf is the least that can be kept
    while low < high:
        middle = (low + high) // 2
        share = cost.share(at(thresholds[middle]))
        if abs(share - budget) <= TOLERANCE:
            return at(thresholds[middle])
        if share > budget:
            low = middle + 1
        else:
            high = middle
    return at(thresholds[high])


def rebudget(plan: DipgoPlan, budget: float, cost: CostName = "macs") -> DipgoPlan:
    """The plan that the scores of a learned search give for another budget. Its quality is not measured.

    Raises:
        SdfpError: If the plan has no scores or not this cost, or the budget is out of range.
    """
    if plan.scores is None:
        raise SdfpError(
            f"plan for {plan.pipeline}",
            "has no learned scores",
            "Search with --method learned, or search again with the other --budget.",
        )
    if not 0 < budget <= 1:
        raise SdfpError("BUDGET", f"is {budget:g}", "Give the share of the full run to spend, in (0, 1].")
    check_cost(cost)
    counted = plan.macs if cost == "macs" else plan.latency
    if counted is None:
        raise SdfpError(
            "--cost latency",
            "the plan was searched without measuring it",
            "Search with --cost latency on the machine that counts.",
        )
    layout = Layout(tuple(plan.units))
    gates = gates_at_budget(np.array(plan.scores), budget, layout, counted, plan.reuse, plan.rhythm.stages)
    made = plan.made.model_copy(update={"budget": budget, "cost": cost})
    return plan.model_copy(
        update={"executed": rows(gates), "forecasts": None, "quality": None, "native": None, "made": made}
    )


def check_cost(cost: str) -> None:
    """Refuses a cost that is none."""
    if cost not in get_args(CostName):
        raise SdfpError("--cost", f"{cost} is unknown", f"Choose from {', '.join(get_args(CostName))}.")

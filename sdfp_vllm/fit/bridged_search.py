"""The search with bridges: the same, over rollouts whose keep sets are bridged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from sdfp_vllm.bridge import BridgeKind
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.fit.bridges import BridgeFitter, FittedBridges
from sdfp_vllm.fit.cost import MeasuredCost, measure_bridge_ms
from sdfp_vllm.fit.rollout import DraftRollout
from sdfp_vllm.fit.rounds import AcceptedRuns
from sdfp_vllm.fit.search import Choice, search, search_above
from sdfp_vllm.plan import CostModel, LayerScore

BridgeRequest = Literal["none", "bias", "affine", "low-rank", "auto"]
REQUESTS: tuple[BridgeRequest, ...] = ("none", "bias", "affine", "low-rank", "auto")
_TRIED: tuple[BridgeKind, ...] = ("affine", "low-rank")  # a bias is an affine map with less to it
# What bridges must add to the predicted speed: below it the gain is within the prediction's error.
MARGIN = 1.02


@dataclass(frozen=True)
class BridgedChoice:
    """What the search found, the bridges it found it with (none: empty), and the cost it reckoned with."""

    choice: Choice
    fitted: FittedBridges
    cost: MeasuredCost

    def cost_model(self) -> CostModel:
        """The plan's record of the cost: the bridges' time is part of a draft step's overhead."""
        bridges = len(self.fitted.runs) * self.cost.bridge_ms
        return replace(self.cost, draft_overhead_ms=self.cost.draft_overhead_ms + bridges).model()


class BridgedRollout:
    """A `DraftRollout` to the search, that fits bridges to every keep set before it tries it."""

    def __init__(self, rollout: DraftRollout, fitter: BridgeFitter, kind: BridgeKind):
        self._rollout, self._fitter, self._kind = rollout, fitter, kind
        self.fitted: dict[tuple[int, ...], FittedBridges] = {}

    def run(
        self, keep: Sequence[int], steps: int, proceed: Callable[[AcceptedRuns], bool] = lambda runs: True
    ) -> AcceptedRuns:
        fitted = self.fitted[tuple(keep)] = self._fitter.fit(keep, self._kind)
        return self._rollout.run(keep, steps, proceed, fitted.bridges)


def search_bridged(
    request: BridgeRequest,
    rollout: DraftRollout,
    calibration: Tensor,
    scores: Sequence[LayerScore],
    cost: MeasuredCost,
    **options: Any,
) -> BridgedChoice:
    """Searches keep sets and draft lengths with the bridges asked for.

    "auto" searches without bridges first, then with each kind what could beat that by MARGIN: what it
    costs more is the fits and rollouts of those keep sets alone. A kind by name is searched in the place
    of the search without.

    Args:
        calibration: int64 [N, T] windows that bridges are fitted on; other text than the rollout's.
        options: Passed to `search`.
    """
    if request == "none":
        return BridgedChoice(search(rollout, scores, cost, **options), FittedBridges(), cost)
    fitter = BridgeFitter(rollout.stack, calibration)
    if request != "auto":
        bridged = BridgedRollout(rollout, fitter, request)
        dearer = replace(cost, bridge_ms=measure_bridge_ms(rollout.stack, fitter.blank(request)))
        choice = search(bridged, scores, dearer, **options)  # type: ignore[arg-type]
        return BridgedChoice(choice, bridged.fitted[tuple(choice.kept_layers)], dearer)
    best = BridgedChoice(search(rollout, scores, cost, **options), FittedBridges(), cost)
    bar = best.choice.prediction.speedup * MARGIN
    for kind in _TRIED:
        bridged = BridgedRollout(rollout, fitter, kind)
        dearer = replace(cost, bridge_ms=measure_bridge_ms(rollout.stack, fitter.blank(kind)))
        better = search_above(bar, bridged, scores, dearer, **options)  # type: ignore[arg-type]
        if better is not None:
            best = BridgedChoice(better, bridged.fitted[tuple(better.kept_layers)], dearer)
            bar = better.prediction.speedup
    return best


def searches(request: BridgeRequest) -> int:
    """How many searches `request` takes."""
    return 1 + len(_TRIED) if request == "auto" else 1


def check_bridge(request: str) -> None:
    """Raises SdfpError unless `request` is one of REQUESTS."""
    if request not in REQUESTS:
        raise SdfpError("--bridge", f"{request!r} is not known", f"Use one of {', '.join(REQUESTS)}.")

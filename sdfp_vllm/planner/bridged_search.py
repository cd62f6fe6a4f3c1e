"""The search with bridges: the same, over rollouts whose keep sets are bridged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.bridge import BridgeKind
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.schema import LayerScore
from sdfp_vllm.planner.bridges import BridgeFitter, FittedBridges
from sdfp_vllm.planner.cost import measure_bridge_ms
from sdfp_vllm.planner.rollout import Continuations, DraftRollout
from sdfp_vllm.planner.rounds import AcceptedRuns
from sdfp_vllm.planner.search import Choice, search_above

BridgeRequest = Literal["none", "bias", "affine", "low-rank", "auto"]
_Variant = tuple[BridgeKind, int] | None  # kind and rank; None for no bridge
_LOW_RANK: list[_Variant] = [("low-rank", 16), ("low-rank", 64)]
# What each request tries, in order. In "auto" no bias: an affine map is one with more to it, at the same cost.
VARIANTS: dict[BridgeRequest, list[_Variant]] = {
    "none": [None],
    "bias": [("bias", 0)],
    "affine": [("affine", 0)],
    "low-rank": _LOW_RANK,
    "auto": [None, ("affine", 0), *_LOW_RANK],
}
# What bridges must add to the predicted speed: below it the gain is within the prediction's error.
MARGIN = 1.02


@dataclass(frozen=True)
class BridgedChoice:
    """What the search found, the bridges it found it with (none: empty), and the cost it reckoned with.

    `judged` is its speed on the judging text alone, where variants are compared; a selector that
    confirms on held-out text predicts from both.
    """

    choice: Choice
    fitted: FittedBridges
    cost: Costs
    judged: float

    def costs(self) -> Costs:
        """The plan's record of the cost: the bridges' time is part of a draft step's overhead."""
        bridges = len(self.fitted.runs) * self.cost.bridge_ms
        overhead = self.cost.draft_overhead_ms + bridges
        return self.cost.model_copy(update={"draft_overhead_ms": overhead, "bridge_ms": 0.0})


class BridgedRollout:
    """A `DraftRollout` to the search, that fits bridges to every keep set before it tries it."""

    def __init__(self, rollout: DraftRollout, fitter: BridgeFitter, kind: BridgeKind, rank: int):
        self._rollout, self._fitter, self._kind, self._rank = rollout, fitter, kind, rank
        self.fitted: dict[tuple[int, ...], FittedBridges] = {}

    def run(
        self, keep: Sequence[int], steps: int, proceed: Callable[[AcceptedRuns], bool] = lambda runs: True
    ) -> AcceptedRuns:
        fitted = self.fitted[tuple(keep)] = self._fitter.fit(keep, self._kind, self._rank)
        return self._rollout.run(keep, steps, proceed, fitted.bridges)


def search_bridged(
    request: BridgeRequest,
    rollout: DraftRollout,
    text: Continuations | None,
    scores: Sequence[LayerScore],
    cost: Costs,
    unbridged: Callable[[], Choice] | None = None,
    **options: Any,
) -> BridgedChoice:
    """Searches keep sets and draft lengths with the bridges asked for.

    Each of the request's variants is a search of its own, that tries only what could beat the best so
    far; bridges must beat no bridges by MARGIN. A kind by name is taken even where it is slower than none.

    Args:
        text: What bridges are fitted on, written by the target like the rollout's, from other prompts;
            None where none are asked for.
        unbridged: The search without bridges, which comes first where it is one of the variants; None
            for FIT's. Bridges are always tried over FIT's keep sets: they belong to whole layers.
        options: Passed to `search`.
    """
    fitter = None if text is None else BridgeFitter(rollout.stack, text)
    best: BridgedChoice | None = None
    for variant in VARIANTS[request]:
        bar = 0.0
        if best is not None:
            bar = best.judged * (1.0 if best.fitted.runs else MARGIN)
        if variant is None and unbridged is not None:
            choice = unbridged()
            rounds = rollout.run(choice.keep, choice.draft_tokens).rounds(choice.draft_tokens)
            judged = cost.speedup(choice.keep, choice.draft_tokens, rounds.mean_accepted_length)
            best = BridgedChoice(choice, FittedBridges(), cost, judged)
            continue
        found = _search(variant, bar, rollout, fitter, scores, cost, options)
        best = found or best
    assert best is not None  # nothing is predicted to have no speed at all
    return best


def _search(
    variant: _Variant,
    bar: float,
    rollout: DraftRollout,
    fitter: BridgeFitter | None,
    scores: Sequence[LayerScore],
    cost: Costs,
    options: dict[str, Any],
) -> BridgedChoice | None:
    if variant is None:
        choice = search_above(bar, rollout, scores, cost, **options)
        return BridgedChoice(choice, FittedBridges(), cost, choice.prediction.speedup) if choice else None
    assert fitter is not None
    bridged = BridgedRollout(rollout, fitter, *variant)
    bridge_ms = measure_bridge_ms(rollout.stack, fitter.blank(*variant))
    cost = cost.model_copy(update={"bridge_ms": bridge_ms})
    choice = search_above(bar, bridged, scores, cost, **options)  # type: ignore[arg-type]
    if choice is None:
        return None
    fitted = bridged.fitted[choice.keep.layers]
    return BridgedChoice(choice, fitted, cost, choice.prediction.speedup)


def check_bridge(request: str) -> None:
    """Raises SdfpError unless `request` is one that VARIANTS knows."""
    if request not in VARIANTS:
        raise SdfpError("--bridge", f"{request!r} is not known", f"Use one of {', '.join(VARIANTS)}.")

"""The plan's record of chances: how often the drafts of a view are accepted, and how far their confidence says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sdfp_vllm.pacing.record import CONFIDENCE_EDGES
from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.bridge_file import Run
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.schema import Chances
from sdfp_vllm.planner.rollout import DraftRollout

# Observations that a bin's prior is worth: bins that no draft fell into keep it.
_PRIOR_WEIGHT = 2.0


def measure_chances(
    rollout: DraftRollout,
    keep: KeepSet | Sequence[int],
    steps: int,
    bridges: Mapping[Run, Bridge] | None = None,
    head: nn.Module | None = None,
) -> Chances:
    """Rolls `keep` out once more over the target's text, with the confidence of every draft.

    Args:
        keep: What drafts; a list is of whole layers.
        steps: Draft steps, and as many positions whose acceptance is counted.
        bridges, head: As in `DraftRollout.run`.
    """
    edges = torch.tensor(CONFIDENCE_EDGES)
    tried = torch.zeros(len(CONFIDENCE_EDGES) + 1)
    accepted = torch.zeros_like(tried)

    def watch(confidence: Tensor, right: Tensor) -> None:
        bins = torch.bucketize(confidence.float().cpu(), edges, right=True)
        tried.add_(torch.bincount(bins, minlength=len(tried)))
        accepted.add_(torch.bincount(bins, right.cpu().float(), minlength=len(tried)))

    runs = rollout.run(keep, steps, bridges=bridges, watch=watch, head=head)
    mean = (accepted.sum() / tried.sum()).item()
    prior = torch.tensor(confidence_prior(mean))
    chances = (accepted + _PRIOR_WEIGHT * prior) / (tried + _PRIOR_WEIGHT)
    return Chances(acceptance=runs.rounds(steps).acceptance, confidence=chances.tolist())


def confidence_prior(acceptance: float) -> list[float]:
    """Chances per bin before anything is seen there: midway between the bin's own middle and the mean acceptance."""
    edges = (0.0, *CONFIDENCE_EDGES, 1.0)
    return [((low + high) / 2 + acceptance) / 2 for low, high in pairwise(edges)]

"""FIT scores of skipping and of rounding: one Fisher pass serves both."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdfp_vllm.plan.rounding import rounding_variance
from sdfp_vllm.plan.schema import FitScore, LayerScore
from sdfp_vllm.plan.view import BRANCHES, Precision
from sdfp_vllm.planner.stack import DecoderStack


@torch.no_grad()
def with_rounding(
    stack: DecoderStack, scores: Sequence[LayerScore], precisions: Sequence[Precision]
) -> list[LayerScore]:
    """Adds to each branch what rounding it would cost: Tr(I) * E[(q(theta) - theta)^2] (FIT, arXiv 2210.08502, eq. 7).

    Weights that are not rounded, norms among them, are perturbed by nothing. A branch that has no rounded copies
    (experts) gets no such scores.
    """
    lower = [p for p in precisions if p != "full"]
    return [
        score.model_copy(
            update={
                branch: _scored(getattr(score, branch), stack, i, branch, lower)
                for branch in BRANCHES
                if stack.can_round(branch)
            }
        )
        for i, score in enumerate(scores)
    ]


def _scored(
    score: FitScore, stack: DecoderStack, i: int, branch: str, precisions: Sequence[Precision]
) -> FitScore:
    parameters = stack.attention_parameters(i) if branch == "attention" else stack.mlp_parameters(i)
    total = sum(p.numel() for _, p in parameters)
    matrices = [p.detach() for _, p in parameters if p.ndim == 2]
    found: dict[Precision, float] = {}
    for precision in precisions:
        squares = sum(rounding_variance(w, precision) * w.numel() for w in matrices)
        found[precision] = score.fisher_trace * squares / total
    return score.model_copy(update={"rounding_scores": found})

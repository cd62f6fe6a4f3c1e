"""`--selector gradient`: gates on all branches at once, learned with a few gradient steps.

In the spirit of DiP-GO (arXiv 2410.16942), which learns what a diffusion model may skip: every branch
has a logit, its gate is 1 where the logit is positive (straight-through: the sigmoid's derivative
passes), and the loss is

    KL(full model || draft) / scale + (gated share of the layers' time)

at the first draft step, `first_step.py`. `scale` is the divergence with no branch at all, so that all
branches together are worth about what they cost. As in DiP-GO the cost term rests while the share is
below BUDGET, and one training serves every budget: a falling threshold on the logits gives nested keep
sets, which are rolled out as FIT's are. Where branches cannot run by themselves, a layer's two share a logit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.planner.families import attention_share
from sdfp_vllm.planner.first_step import FirstStep

STEPS = 40
BUDGET = 0.2  # DiP-GO's
_CHUNKS = 2  # of FirstStep's, in each step's mean
_LEARNING_RATE = 4.0  # over the number of layers: a layer's worth is about one in as many
_START = 1.0  # every gate starts open


def learn_gates(
    first: FirstStep,
    cost: Costs,
    *,
    steps: int = STEPS,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Logits of the gates, float32 [L, 2] (attention, MLP): the higher, the more a branch is worth its time.

    Args:
        advance: Called with 1 after each gradient step.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((cost.num_layers, 2), _START)
    tied = not first.stack.has_sublayers
    attention = attention_share(cost)
    share = torch.tensor([attention, 1 - attention]).expand_as(logits) / cost.num_layers
    scale, _ = first.divergence(torch.zeros_like(logits))
    for _ in range(steps):
        gates = (logits > 0).float()
        some = torch.randperm(len(first.chunks), generator=generator)[:_CHUNKS].tolist()
        _, slope = first.divergence(gates, some)
        slope /= scale
        if float((share * gates).sum()) > BUDGET:
            slope += share
        chance = torch.sigmoid(logits)
        slope *= chance * (1 - chance)
        if tied:
            slope = slope.sum(1, keepdim=True).expand_as(slope)
        # Plain descent, as DiP-GO's: a step scaled for each gate would not see what the gate is worth.
        logits = logits - _LEARNING_RATE * cost.num_layers * slope
        if advance:
            advance(1)
    return logits

"""DraftStep: what one draft step gives, and how its tokens are drawn where they are sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sdfp_vllm.engine.upstream.symbols import SamplingMetadata
from sdfp_vllm.engine.v1.sampling import cut, draw, tempered

GREEDY_BELOW = 1e-5  # vLLM's own bound: a lower temperature is greedy


@dataclass(frozen=True)
class DraftStep:
    """What one draft step gave: int64 [batch] tokens, their distributions where sampled, float32 [batch] confidence."""

    tokens: torch.Tensor
    probs: torch.Tensor | None
    confidence: torch.Tensor | None


def draw_step(logits: torch.Tensor, sampling: SamplingMetadata) -> DraftStep:
    """Draws a step's tokens as their requests ask; greedy requests of the batch get the most probable.

    Args:
        logits: float [batch, vocabulary]; overwritten where float32.
    """
    assert sampling.temperature is not None
    greedy = sampling.temperature < GREEDY_BELOW
    probs = tempered(logits, torch.where(greedy, 1.0, sampling.temperature))
    # Before the cut, which would hide what a pacer wants to know: with top_k = 1 all would be certain.
    confidence = probs.amax(-1)
    if sampling.top_k is not None or sampling.top_p is not None:
        probs = cut(probs, sampling.top_k, sampling.top_p)
    tokens = draw(probs, sampling.generators)
    if not sampling.all_random:
        tokens = torch.where(greedy, probs.argmax(-1), tokens)
    return DraftStep(tokens, probs, confidence)

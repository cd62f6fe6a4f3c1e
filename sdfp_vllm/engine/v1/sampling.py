"""Sampled drafts: the request's temperature, top-k and top-p, applied to the draft's own logits, and a draw.

The target's distribution is cut that way before drafts are held against it, so what a draft draws outside
of the cut is rejected. Which distribution drafts come from decides only how many are accepted: output is
exact for any, as long as the rejection sampler is told of the very one that was drawn from. So the cut may
be found cheaply: among the `CANDIDATES` most probable tokens, where vLLM's own top-p sorts the vocabulary
(on one core and a vocabulary of 152k 15 ms a row, this 0.5).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CANDIDATES = 256


def tempered(logits: Tensor, temperature: Tensor) -> Tensor:
    """Distributions before any cut.

    Args:
        logits: float [B, V]; overwritten where float32. -inf for tokens that are never drawn.
        temperature: float32 [B], positive.

    Returns:
        float32 [B, V].
    """
    return logits.float().div_(temperature[:, None]).softmax(-1)


def cut(probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Cuts each distribution to its most probable tokens, in place: by top-k, what is left by top-p, as vLLM.

    Kept are the tokens at least as probable as the least one that belongs in, ties included. Two things are
    the draft's own, for the sake of looking at `CANDIDATES` tokens only. A top-k above their number is taken
    for none. And where they hold less than top-p, the row stays whole: the target's cut keeps more than
    them, and drafts that stop short of it would miss more than drafts that ignore it.

    Args:
        probs: float32 [B, V], each row of sum 1.
        top_k: int [B], from 1; V or more means none. None: no row has any.
        top_p: float32 [B], in (0, 1]; 1 means none. None: no row has any.

    Returns:
        `probs`; rows that are cut are renormalised, the others have not changed by a bit.
    """
    vocabulary = probs.shape[1]
    best = probs.topk(min(CANDIDATES, vocabulary)).values  # [B, C], descending
    sums = best.cumsum(-1)
    kept = torch.ones_like(best, dtype=torch.bool)  # a beginning of each row of `best`
    found = kept.new_zeros(len(best), 1)  # whether the row's cut is among the candidates
    mass = best.new_ones(len(best), 1)  # what top-p is a part of
    if top_k is not None:
        k = top_k[:, None].long()
        found = (k <= best.shape[1]) & (k < vocabulary)
        last = k.clamp(1, best.shape[1]) - 1
        kept = ~found | (torch.arange(best.shape[1], device=best.device) <= last)
        mass = torch.where(found, sums.gather(1, last), mass)
    if top_p is not None:
        p = top_p[:, None]
        kept &= (p >= 1) | (sums - best < p * mass)
        kept[:, 0] = True  # whatever a tiny top-p rounds to
        found = found | ((p < 1) & (sums[:, -1:] >= p))
    least = best.gather(1, kept.sum(-1, keepdim=True) - 1)
    probs.masked_fill_(found & (probs < least), 0.0)
    return probs.div_(torch.where(found, probs.sum(-1, keepdim=True), 1.0))


def draw(probs: Tensor, generators: Mapping[int, torch.Generator]) -> Tensor:
    """One token from each distribution, by inversion: one random number a row instead of one a token.

    In float64, where sums over a large vocabulary still tell improbable tokens apart: the distribution drawn
    from must be the one that the rejection sampler is told of.

    Args:
        probs: float32 [B, V].
        generators: Of the rows that have one of their own.

    Returns:
        int64 [B].
    """
    sums = probs.cumsum(-1, dtype=torch.float64)
    point = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device)
    for row, generator in generators.items():
        point[row].uniform_(generator=generator)
    # The first token whose sum lies above the point: never one of probability 0, past the end only for NaN.
    return torch.searchsorted(sums, point * sums[:, -1:], right=True)[:, 0].clamp_(max=probs.shape[1] - 1)

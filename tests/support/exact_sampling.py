"""What vLLM promises to sample from, in float64, and how far draws are from it.

The promise, in vLLM's order: penalties on the logits, temperature, top-k, top-p.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 4.0  # standard deviations of chi-square: a right sampler passes it once in 10,000 runs or so
_FEWEST = 5.0  # cells expected less often than this say nothing under a normal approximation


def distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities of the next token, [..., V], from logits after penalties, [..., V]."""
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def penalised(
    logits: Tensor,
    prompt: Tensor,
    output: Tensor,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
) -> Tensor:
    """Logits [..., V] after penalties, given how often each token is in the prompt and the output, [..., V]."""
    seen = (prompt + output) > 0
    repeated = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    logits = torch.where(seen, repeated, logits)
    return logits - frequency_penalty * output - presence_penalty * (output > 0)


def z_of_draws(probs: Tensor, drawn: Tensor, group: Tensor) -> float:
    """Chi-square of draws, each from a distribution of its own that may depend on earlier draws.

    Within each group the counts minus their expectation are a sum of martingale differences with
    covariance sum(diag p - p p'), so their quadratic form is chi-square with that matrix's rank.

    Args:
        probs: float64 [N, V], what each draw should have come from.
        drawn: int64 [N].
        group: int64 [N], draws to count together (by the token before, for one).

    Returns:
        Standard deviations above chi-square's mean.
    """
    assert (probs.gather(1, drawn[:, None]) > 0).all(), "a token outside the allowed set was sampled"
    chi2 = freedom = 0.0
    for g in group.unique():
        p = probs[group == g]
        counts = F.one_hot(drawn[group == g], p.shape[1]).sum(0)
        expected = p.sum(0)
        more, degrees = _quadratic(counts - expected, torch.diag(expected) - p.T @ p, expected)
        chi2, freedom = chi2 + more, freedom + degrees
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def z_of_counts(counts: Tensor, probs: Tensor) -> float:
    """Chi-square of counts [V] of independent draws from `probs`, float64 [V]; as `z_of_draws`."""
    assert counts[probs == 0].sum() == 0, "an outcome that cannot be was drawn"
    n = counts.sum()
    covariance = n * (torch.diag(probs) - torch.outer(probs, probs))
    chi2, freedom = _quadratic(counts - n * probs, covariance, n * probs)
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def z_between(a: Tensor, b: Tensor) -> float:
    """Chi-square of the difference between two samples' counts [V] of equal size; as `z_of_draws`."""
    assert a.sum() == b.sum()
    common = a + b > _FEWEST
    chi2 = ((a - b).double() ** 2 / (a + b))[common].sum().item()
    freedom = int(common.sum()) - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


def total_variation(a: Tensor, b: Tensor) -> float:
    """Half the L1 distance between two samples' frequencies, counts [V]."""
    return 0.5 * (a / a.sum() - b / b.sum()).abs().sum().item()


def _quadratic(difference: Tensor, covariance: Tensor, expected: Tensor) -> tuple[float, float]:
    """(d' C^+ d, rank C) over the cells expected often enough."""
    common = expected > _FEWEST
    difference, covariance = difference[common].double(), covariance[common][:, common]
    values, vectors = torch.linalg.eigh(covariance)
    real = values > values.max() * 1e-9
    along = (vectors.T @ difference)[real]
    return (along**2 / values[real]).sum().item(), float(real.sum())

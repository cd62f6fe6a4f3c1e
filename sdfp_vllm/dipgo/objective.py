"""What the pruner is trained on: the same images, for fewer operations (arXiv 2410.16942, equations 5 to 7)."""

from __future__ import annotations

from typing import Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfp_vllm.dipgo.quality import ssim
from sdfp_vllm.dipgo.sampling import Sampler

Consistency = Literal["ssim", "latents"]


def consistency(kind: Consistency, sampler: Sampler, latents: Tensor, full: Tensor) -> Tensor:
    """1 - SSIM of the decoded images ("ssim"), or the mean squared error of the latents ("latents"); a scalar."""
    if kind == "latents":
        return (latents - full).square().mean()
    with torch.no_grad():
        target = sampler.decode(full)
    return 1 - ssim(sampler.decode(latents), target, clamp=False).mean()


def sparsity(gates: Tensor, gamma: NDArray) -> Tensor:
    """Mean over calls and units of gamma_i * g[t, i]: a unit weighs what closing it saves, its cascade included."""
    return (gates * torch.as_tensor(gamma, dtype=gates.dtype)).mean()

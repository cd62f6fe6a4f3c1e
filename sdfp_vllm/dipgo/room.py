"""How much memory a search may take, and how many images run together in that."""

from __future__ import annotations

import numpy as np
import psutil
import torch

from sdfp_vllm.dipgo.layout import WHOLE, Layout
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.spill import Spill
from sdfp_vllm.dipgo.trace import Trace

SHARE = 0.5  # of the memory that is free, by default


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that are free where a model on `device` (default: the CPU) keeps its activations."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def limit(sampler: Sampler, memory: int | None) -> None:
    """Limits what a sampler's generations take to `memory` bytes beside the model (default: `SHARE` of what is free).

    Those with gradients keep to it (`surrogate.record`). Those without take fewer images at once where the gradients of a denoiser
    call would not fit for all, which is an upper bound of what they need.
    """
    if memory is None:
        memory = int(SHARE * free_memory(next(sampler.denoiser.parameters()).device))
    sampler.memory = memory
    sampler.at_once = max(1, memory // max(1, _weigh(sampler, WHOLE, False)[0]))


def room_for(
    sampler: Sampler, layout: Layout, residual: bool, projections: int, images: int
) -> tuple[int, int]:
    """How many of `images` are recorded together, and the bytes to leave free for their gradients while values are kept."""
    if sampler.memory is None:
        return images, 0
    gradients, values = _weigh(sampler, layout, residual)
    gradients += projections * values  # the adjoints of the values of a step
    together = max(1, min(images, sampler.memory // max(1, gradients + sampler.calls * values)))
    return together, together * gradients


def _weigh(sampler: Sampler, layout: Layout, residual: bool) -> tuple[int, int]:
    """Bytes of one image: what gradients of a denoiser call take, and the units' values of a step. Makes the calls of a step."""
    gates = np.ones((sampler.calls, len(layout.units)), dtype=bool)
    with (
        Spill(sampler.memory, sampler.weights()) as spill,
        Trace(sampler, layout, gates, residual, np.full(gates.shape, "0"), spill) as trace,
    ):
        return trace.weigh()

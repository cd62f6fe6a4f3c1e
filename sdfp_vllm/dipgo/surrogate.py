"""Predicts what any pattern of gates does to the images, from one recorded generation and a few backward passes.

The Fisher idea of SDFP, carried over to time: a unit that is reused errs by (what is reused -
what it would have computed), and the images move by the Jacobian of the rest of the
generation times that error. Random projections v of the images need only vector-Jacobian
products u = J^T v, one backward pass for all units and calls at once; and because a reused value
is a combination of values the unit computed in earlier calls, all that is needed of unit i is the
table of inner products P[t, a] = <u[t], value[a]>. The expected squared error of a pattern is then
the mean over projections of (sum of its table entries)^2, interactions between units and calls
included, in microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfp_vllm.dipgo.forecast import Forecasts
from sdfp_vllm.dipgo.layout import Gates, Layout
from sdfp_vllm.dipgo.prediction import CAUTION, Surrogate
from sdfp_vllm.dipgo.room import room_for
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.spill import Spill
from sdfp_vllm.dipgo.trace import Trace

_BEYOND = 0.1  # of an error beyond the range of images


def record(
    sampler: Sampler,
    layout: Layout,
    reuse: str,
    order: int,
    seeds: Sequence[int],
    projections: int,
    gates: Gates | None = None,
    full: Tensor | None = None,
    kinds: Forecasts | None = None,
    at_once: int | None = None,
    cautious: bool = False,
) -> Surrogate:
    """Runs one generation with `gates` (default: the full run) and `projections` backward passes.

    Memory: within `sampler.memory`, the activations of one denoiser call or the decoder and the units' values of all calls. As
    many images run together as that is enough for; what is beyond it for a single one lies in files meanwhile.

    Args:
        order: Of the forecasts of closed gates, where `kinds` does not say it for each.
        full: What is `seen` of the full run on `seeds`; needed with `gates`.
        at_once: Images that have a draw of projections together, and run together if memory allows (default: all).
        cautious: Predict for a search: with `CAUTION`, and with a weight for every image by `_weights`.
    """
    around = np.ones((sampler.calls, len(layout.units)), dtype=bool)
    if gates is not None:
        around = layout.closure(gates, reuse)
    if kinds is None:
        kinds = np.full(around.shape, str(order))
    at_once = at_once or len(seeds)
    together, spare = room_for(sampler, layout, reuse == "residual", projections, min(at_once, len(seeds)))
    tables: list[NDArray] = []
    offsets: list[NDArray] = []
    for first in range(0, len(seeds), at_once):
        batch = seeds[first : first + at_once]
        errors = None if full is None else full[first : first + at_once]
        parts = []
        for begin in range(0, len(batch), together):
            some = slice(begin, begin + together)
            with (
                Spill(sampler.memory, sampler.weights()) as spill,
                Trace(sampler, layout, around, reuse == "residual", kinds, spill, spare) as trace,
            ):
                parts.append(_projected(trace, spill, batch, some, projections, errors))
        for table, offset in zip(
            *(zip(*each, strict=True) for each in zip(*parts, strict=True)), strict=True
        ):
            tables.append(np.concatenate(table))
            offsets.append(np.concatenate(offset))
    return Surrogate(
        np.concatenate(tables).astype(np.float64),
        layout,
        reuse,
        order,
        around,
        np.concatenate(offsets).astype(np.float64),
        sampler.rhythm.stages,
        weights=_weights(tables, projections) if cautious else None,
        caution=CAUTION if cautious else 0.0,
        kinds=kinds,
    )


def seen(sampler: Sampler, latents: Tensor) -> Tensor:
    """What people see of latents: decoded images. What is beyond their range, where guidance takes many pixels, hardly counts.

    It counts a little, so that a gate that moves nothing else is not free.
    """
    images = sampler.decode(latents)
    within = images.clamp(-1, 1)
    return within + _BEYOND * (images - within)


def _projected(
    trace: Trace, spill: Spill, batch: Sequence[int], some: slice, projections: int, full: Tensor | None
) -> tuple[NDArray, NDArray]:
    """Of `some` of a batch's images the tables (projections, images, units, steps, steps), and the errors of what is seen.

    Which projections an image has follows from the batch and its place in it, not from how many images run together.
    """
    sampler = trace.sampler
    latents = trace.latents(batch[some])
    adjoints: list[list[Tensor]] = [[] for _ in range(projections)]
    offsets = np.zeros((projections, len(latents)), dtype=np.float32)
    directions: list[Tensor] = []
    for i in range(len(latents)):  # one by one: a decoder takes more memory than a denoiser
        entered = latents[i : i + 1].detach().requires_grad_()
        with spill.saving():
            image = seen(sampler, entered)
        directions = directions or _directions(batch, some, image, projections)
        error = None if full is None else (image - full[some][i : i + 1]).detach()
        for k, direction in enumerate(directions):
            v = direction[i : i + 1]
            adjoints[k] += torch.autograd.grad((image * v).sum(), entered, retain_graph=k + 1 < projections)
            if error is not None:
                offsets[k, i] = (error * v).sum().item()
        del image
    return trace.products(latents, [torch.cat(rows) for rows in adjoints]), offsets


def _directions(batch: Sequence[int], some: slice, image: Tensor, projections: int) -> list[Tensor]:
    """What `some` of the batch's images are projected on: as drawn for the whole batch."""
    draw = torch.Generator().manual_seed(batch[0])
    shape = len(batch), *image.shape[1:]
    return [torch.randn(shape, generator=draw)[some].clone().to(image.device) for _ in range(projections)]


def _weights(tables: Sequence[NDArray], projections: int) -> NDArray:
    """A weight for each row of `tables`: one over what its image errs by where single values are taken from the step before.

    Likeness in dB is a mean of logarithms, in which an image that errs much counts as one that errs little. In a plain mean of
    squares a few images are nearly all.
    """
    errors = []
    for first in range(0, len(tables), projections):
        batch = np.stack(tables[first : first + projections])
        before, own = (np.diagonal(batch, -k, axis1=-2, axis2=-1) for k in (1, 0))
        errors += [((before - own[..., 1:]) ** 2).mean((0, 2, 3), dtype=np.float64)] * len(batch)
    error = np.concatenate(errors)
    largest = error.max()
    return 1 / np.maximum(error, 1e-3 * largest) if largest > 0 else np.ones_like(error)

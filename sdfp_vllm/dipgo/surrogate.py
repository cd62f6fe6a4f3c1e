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
from typing import Any

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from sdfp_vllm.dipgo.clock import Clock
from sdfp_vllm.dipgo.forecast import KINDS, Forecasts
from sdfp_vllm.dipgo.history import History
from sdfp_vllm.dipgo.layout import Gates, Layout, Unit
from sdfp_vllm.dipgo.prediction import CAUTION, Surrogate
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.streams import added, entering, passed

_HOOK = "sdfp_dipgo_trace"
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

    Memory: the activations of all units in all calls, for `at_once` images (default: all), and the decoder's.

    Args:
        order: Of the forecasts of closed gates, where `kinds` does not say it for each.
        full: What is `seen` of the full run on `seeds`; needed with `gates`.
        cautious: Predict for a search: with `CAUTION`, and with a weight for every image by `_weights`.
    """
    around = np.ones((sampler.calls, len(layout.units)), dtype=bool)
    if gates is not None:
        around = layout.closure(gates, reuse)
    if kinds is None:
        kinds = np.full(around.shape, str(order))
    at_once = at_once or len(seeds)
    recorded = []
    for first in range(0, len(seeds), at_once):
        some = slice(first, first + at_once)
        with _Trace(sampler, layout, around, reuse == "residual", kinds) as trace:
            recorded += _projected(trace, seeds[some], projections, None if full is None else full[some])
    table = np.concatenate([table for table, _ in recorded]).astype(np.float64)
    return Surrogate(
        table,
        layout,
        reuse,
        order,
        around,
        np.concatenate([offset for _, offset in recorded]).astype(np.float64),
        sampler.rhythm.stages,
        weights=_weights([t for t, _ in recorded], projections) if cautious else None,
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
    trace: _Trace, seeds: Sequence[int], projections: int, full: Tensor | None
) -> list[tuple[NDArray, NDArray]]:
    """Of each projection the table (images, units, steps, steps), and the error of what is seen (images,)."""
    sampler = trace.sampler
    images = seen(sampler, sampler.latents(seeds))
    error = torch.zeros_like(images) if full is None else (images - full).detach()
    draw = torch.Generator().manual_seed(seeds[0])
    flat_taps = [leaf for row in trace.taps for unit in row for leaf in unit]
    found = []
    for k in range(projections):
        v = torch.randn(images.shape, generator=draw)
        adjoints = torch.autograd.grad(
            (images * v).sum(), flat_taps, retain_graph=k + 1 < projections, allow_unused=True
        )
        offset = (error * v).flatten(1).sum(1).numpy()
        found.append((_products(trace, iter(adjoints), len(seeds)), offset))
    return found


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


def _products(trace: _Trace, adjoints: Any, images: int) -> NDArray:
    """(images, units, steps, steps): inner products of each step's adjoint with each step's computed value.

    A unit's value is all that it gives in all the calls of a step, so that is what the products are summed over.
    """
    calls, units = len(trace.values), len(trace.values[0])
    grads = [[[next(adjoints) for _ in unit] for unit in row] for row in trace.taps]
    out = np.zeros((images, units, calls, calls), dtype=np.float32)
    for i in range(units):
        for leaf in range(len(trace.values[0][i])):
            values = torch.stack([row[i][leaf] for row in trace.values])
            u = torch.stack(
                [torch.zeros_like(values[0]) if g[i][leaf] is None else g[i][leaf] for g in grads]
            )
            # Rows r and r + images are the two halves of guidance for image r.
            values, u = (x.reshape(calls, -1, images, x[0, 0].numel()) for x in (values, u))
            out[:, i] += torch.einsum("tgbd,agbd->bta", u, values).numpy()
    return out


class _Trace:
    """Hooks that run every unit, note what it computes, and put a differentiable zero on what is passed on."""

    def __init__(self, sampler: Sampler, layout: Layout, gates: Gates, residual: bool, kinds: Forecasts):
        self.sampler, self._layout = sampler, layout
        self._gates, self._residual, self._kinds = gates, residual, kinds
        calls, units = gates.shape
        self.values: list[list[list[Tensor]]] = [[[] for _ in range(units)] for _ in range(calls)]
        self.taps: list[list[list[Tensor]]] = [[[] for _ in range(units)] for _ in range(calls)]

    def __enter__(self) -> _Trace:
        self.clock = Clock(self.sampler.rhythm)
        for stage, denoiser in enumerate(self.sampler.denoisers):
            for i, (unit, module) in enumerate(
                zip(self._layout.units, self._layout.modules(denoiser), strict=True)
            ):
                runs, kinds = self._gates[:, i].tolist(), self._kinds[:, i].tolist()
                tap = _Tap(self, i, unit, runs, kinds, self._residual)
                HookRegistry.check_if_exists_or_initialize(module).register_hook(tap, _HOOK)
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            registry.register_hook(self.clock.hook(stage), _HOOK + "_clock")
        return self

    def __exit__(self, *_: object) -> None:
        for denoiser in self.sampler.denoisers:
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            registry.remove_hook(_HOOK + "_clock", recurse=False)
            for module in self._layout.modules(denoiser):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK, recurse=False)


class _Tap(ModelHook):
    def __init__(
        self, trace: _Trace, index: int, unit: Unit, runs: list[bool], kinds: list[str], residual: bool
    ):
        super().__init__()
        self._trace, self._index, self._unit, self._runs, self._residual = trace, index, unit, runs, residual
        self._kinds = kinds
        self._histories: dict[int, History] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step, branch = self._trace.clock.step, self._trace.clock.now.branch
        history = self._histories.setdefault(branch, History(max(KINDS.values())))
        # Of the input as it is now: the unit may write into it.
        streams = [x.clone() for x in entering(self._unit, module, args, kwargs)] if self._residual else []
        output = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]  # set by the registry
        leaves, spec = tree_flatten(added(self._unit, streams, output) if self._residual else output)
        # Beside tensors a block may give None, for a stream that nothing reads any more.
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        computed = [leaves[i].detach() for i in places]
        given = [leaves[i] for i in places]
        if self._runs[step]:
            history.store(step, computed)
        else:
            # Detached: what a later reuse of the same value does is an error of that later call.
            given = history.recall(step, self._kinds[step])
        taps = [torch.zeros_like(leaf).requires_grad_() for leaf in given]
        self._trace.values[step][self._index] += computed
        self._trace.taps[step][self._index] += taps
        for i, leaf, tap in zip(places, given, taps, strict=True):
            leaves[i] = leaf + tap
        value = tree_unflatten(leaves, spec)
        return passed(self._unit, streams, value) if self._residual else value

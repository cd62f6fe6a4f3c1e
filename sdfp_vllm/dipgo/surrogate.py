"""Predicts what any pattern of gates does to the images, from one recorded generation and a few backward passes.

The Fisher idea of SDFP, carried over to time: a unit that is reused errs by (what is reused -
what it would have computed), and the final latents move by the Jacobian of the rest of the
generation times that error. Random projections v of the latents need only vector-Jacobian
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
from sdfp_vllm.dipgo.forecast import KINDS, Forecasts, coefficients
from sdfp_vllm.dipgo.history import History
from sdfp_vllm.dipgo.layout import Gates, Layout, Unit
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.streams import added, entering, passed

_HOOK = "sdfp_dipgo_trace"
_REMEMBERED = 50_000


class Surrogate:
    """Predicted error of gates, linear in each unit's own error around the generation that was recorded.

    Args:
        table: (projections, units, steps, steps): P as above; entry [.., t, a] for a <= t.
        around: The gates of the recorded generation.
        offset: (projections,): the projections of its latents' error; zeros for the full run.
        stages: The steps at which a denoiser takes over.
    """

    def __init__(
        self,
        table: NDArray,
        layout: Layout,
        reuse: str,
        order: int,
        around: Gates,
        offset: NDArray,
        stages: Sequence[int] = (0,),
    ):
        self._stages = set(stages)
        self._table, self._layout, self._reuse, self._order = table, layout, reuse, order
        self._columns: dict[tuple[int, bytes, bytes], NDArray] = {}
        self._offset = offset
        self._offset = offset - self._sum(around)

    def loss(self, gates: Gates) -> float:
        """Predicted mean squared error of the final latents, summed over an image's elements."""
        return float(np.mean((self._offset + self._sum(gates)) ** 2))

    def forecasts(self, gates: Gates, sweeps: int = 4) -> tuple[Forecasts, float]:
        """For each closed gate the kind of forecast with which the predicted error is least, and that error.

        What a forecast errs by is in the table, for every kind: so each is chosen exactly, given the others. They are gone
        through in turn, from those of the surrogate's order, until none changes or `sweeps` are done.

        Returns:
            (steps, units) of `forecast.KINDS`; and the predicted error, as `loss`.
        """
        live = self._layout.live(gates, self._reuse)
        executed = gates & live
        kinds = np.full(gates.shape, str(self._order))
        closed = [(int(t), int(i)) for t, i in np.argwhere(live & ~executed)]
        errors = {(t, i): self._errors(t, i, executed[:, i]) for t, i in closed}
        total = self._offset + np.sum([errors[place][str(self._order)] for place in closed], axis=0)
        for _ in range(sweeps):
            changed = False
            for place in closed:
                without = total - errors[place][str(kinds[place])]
                losses = {kind: np.mean((without + error) ** 2) for kind, error in errors[place].items()}
                best = min(losses, key=lambda kind: float(losses[kind]))
                if best != kinds[place]:
                    kinds[place], changed = best, True
                    total = without + errors[place][best]
            if not changed:
                break
        return kinds, float(np.mean(total**2))

    def _errors(self, step: int, unit: int, executed: NDArray[np.bool_]) -> dict[str, NDArray]:
        """What each kind of forecast in one step errs by: (projections,) each."""
        began = max(s for s in self._stages if s <= step)
        computed = [s for s in range(step - 1, began - 1, -1) if executed[s]][:3]
        table = self._table[:, unit, step]
        return {
            kind: sum(
                c * table[:, s] for c, s in zip(coefficients(kind, step, computed), computed, strict=False)
            )
            - table[:, step]
            for kind in KINDS
        }

    def _sum(self, gates: Gates) -> NDArray:
        """The projected errors of all reused values that reach the prediction: (projections,)."""
        live = self._layout.live(gates, self._reuse)
        executed = gates & live
        # Searches change one or two units at a time: the others' sums are taken from before.
        if len(self._columns) > _REMEMBERED:
            self._columns.clear()
        total = np.zeros(len(self._offset))
        for i in range(gates.shape[1]):
            key = (i, live[:, i].tobytes(), executed[:, i].tobytes())
            if key not in self._columns:
                self._columns[key] = self._unit_sum(i, live[:, i], executed[:, i])
            total += self._columns[key]
        return total

    def _unit_sum(self, unit: int, live: NDArray[np.bool_], executed: NDArray[np.bool_]) -> NDArray:
        table = self._table[:, unit]
        total = np.zeros(len(table))
        last, before = 0, -1
        for t in range(len(live)):
            if t in self._stages:
                last, before = t, -1
            elif executed[t]:
                last, before = t, last
            elif live[t]:
                ahead = (t - last) / (last - before) if self._order == 1 and before >= 0 else 0.0
                total += table[:, t, last] * (1 + ahead) - table[:, t, before] * ahead - table[:, t, t]
        return total


def record(
    sampler: Sampler,
    layout: Layout,
    reuse: str,
    order: int,
    seeds: Sequence[int],
    projections: int,
    gates: Gates | None = None,
    full: Tensor | None = None,
) -> Surrogate:
    """Runs one generation with `gates` (default: the full run) and `projections` backward passes.

    Memory: the activations of all units in all calls, for `len(seeds)` images at once.

    Args:
        full: Latents of the full run on `seeds`; needed with `gates`.
    """
    calls, units = sampler.calls, len(layout.units)
    around = np.ones((calls, units), dtype=bool) if gates is None else layout.closure(gates, reuse)
    with _Trace(sampler, layout, around, reuse == "residual", order) as trace:
        latents = sampler.latents(seeds)
        images = len(seeds)
        error = torch.zeros_like(latents) if full is None else (latents - full).detach()
        draw = torch.Generator().manual_seed(seeds[0])
        flat_taps = [leaf for row in trace.taps for unit in row for leaf in unit]
        tables, offsets = [], []
        for k in range(projections):
            v = torch.randn(latents.shape, generator=draw)
            adjoints = torch.autograd.grad(
                (latents * v).sum(), flat_taps, retain_graph=k + 1 < projections, allow_unused=True
            )
            tables.append(_products(trace, iter(adjoints), images))
            offsets.append((error * v).flatten(1).sum(1).numpy())
    return Surrogate(
        np.concatenate(tables).astype(np.float64),
        layout,
        reuse,
        order,
        around,
        np.concatenate(offsets).astype(np.float64),
        sampler.rhythm.stages,
    )


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

    def __init__(self, sampler: Sampler, layout: Layout, gates: Gates, residual: bool, order: int):
        self._sampler, self._layout = sampler, layout
        self._gates, self._residual, self._order = gates, residual, order
        calls, units = gates.shape
        self.values: list[list[list[Tensor]]] = [[[] for _ in range(units)] for _ in range(calls)]
        self.taps: list[list[list[Tensor]]] = [[[] for _ in range(units)] for _ in range(calls)]

    def __enter__(self) -> _Trace:
        self.clock = Clock(self._sampler.rhythm)
        for stage, denoiser in enumerate(self._sampler.denoisers):
            for i, (unit, module) in enumerate(
                zip(self._layout.units, self._layout.modules(denoiser), strict=True)
            ):
                tap = _Tap(self, i, unit, self._gates[:, i].tolist(), self._residual, self._order)
                HookRegistry.check_if_exists_or_initialize(module).register_hook(tap, _HOOK)
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            registry.register_hook(self.clock.hook(stage), _HOOK + "_clock")
        return self

    def __exit__(self, *_: object) -> None:
        for denoiser in self._sampler.denoisers:
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            registry.remove_hook(_HOOK + "_clock", recurse=False)
            for module in self._layout.modules(denoiser):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK, recurse=False)


class _Tap(ModelHook):
    def __init__(self, trace: _Trace, index: int, unit: Unit, runs: list[bool], residual: bool, order: int):
        super().__init__()
        self._trace, self._index, self._unit, self._runs, self._residual = trace, index, unit, runs, residual
        self._order = order
        self._histories: dict[int, History] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        step, branch = self._trace.clock.step, self._trace.clock.now.branch
        history = self._histories.setdefault(branch, History(self._order))
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
            given = history.recall(step)
        taps = [torch.zeros_like(leaf).requires_grad_() for leaf in given]
        self._trace.values[step][self._index] += computed
        self._trace.taps[step][self._index] += taps
        for i, leaf, tap in zip(places, given, taps, strict=True):
            leaves[i] = leaf + tap
        value = tree_unflatten(leaves, spec)
        return passed(self._unit, streams, value) if self._residual else value

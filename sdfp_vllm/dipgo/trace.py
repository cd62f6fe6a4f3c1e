"""A generation recorded call by call, so that its gradients take the activations of one denoiser call and no more.

The generation runs without gradients through the denoiser; the pipeline's own arithmetic between the calls keeps its graph,
which is small. Backwards, from the last call to the first, each call is made again with gradients, all projections go through
it, and its graph is dropped. What has to last are the values of the units, for the inner products; a `Spill` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.hooks import HookRegistry, ModelHook
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sdfp_vllm.dipgo.clock import Clock
from sdfp_vllm.dipgo.forecast import KINDS, Forecasts
from sdfp_vllm.dipgo.halves import both, difference, only_conditioned
from sdfp_vllm.dipgo.history import History
from sdfp_vllm.dipgo.layout import Gates, Layout, Unit
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.spill import Kept, Spill
from sdfp_vllm.dipgo.streams import added, entering, passed

_HOOK = "sdfp_dipgo_trace"


@dataclass
class _Call:
    """A denoiser call, as it takes to make it again.

    Attributes:
        arguments: Flat; of those that depend on earlier calls, copies outside the pipeline's graph.
        entered: Those in the graph, which are at `places` of the arguments.
        given: The tensors it returned: leaves, from which the pipeline's graph goes on.
    """

    step: int
    branch: int
    forward: Callable[..., Any]
    arguments: list[Any]
    spec: TreeSpec
    places: list[int]
    entered: list[Tensor]
    given: list[Tensor]


class Trace:
    """Hooks that run every unit, keep what it computes, and make the calls again with gradients. A context manager.

    Args:
        spare: Bytes that are left free in memory when units' values are kept.
    """

    def __init__(
        self,
        sampler: Sampler,
        layout: Layout,
        gates: Gates,
        residual: bool,
        kinds: Forecasts,
        spill: Spill,
        spare: int = 0,
    ):
        self.sampler, self._layout = sampler, layout
        self._gates, self._residual, self._kinds = gates, residual, kinds
        self._spill, self._spare = spill, spare
        self._calls: list[_Call] = []
        self._values: dict[tuple[int, int, int], list[Kept]] = {}  # by step, branch and unit
        self._taps: list[list[Tensor]] = []  # of every unit, in the call that is made again
        self._again: _Call | None = None

    def __enter__(self) -> Trace:
        self._clock = Clock(self.sampler.rhythm)
        for stage, denoiser in enumerate(self.sampler.denoisers):
            modules = self._layout.modules(denoiser)
            for i, (unit, module) in enumerate(zip(self._layout.units, modules, strict=True)):
                registry = HookRegistry.check_if_exists_or_initialize(module)
                registry.register_hook(_Tap(self, i, unit), f"{_HOOK}_{i}")
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            registry.register_hook(_Listen(self), _HOOK + "_call")
            registry.register_hook(self._clock.hook(stage), _HOOK + "_clock")
        return self

    def __exit__(self, *_: object) -> None:
        for denoiser in self.sampler.denoisers:
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            for name in ("_clock", "_call"):
                registry.remove_hook(_HOOK + name, recurse=False)
            # Outermost first: a hook beneath another one that calls it is not taken out of it.
            for i, module in reversed([*enumerate(self._layout.modules(denoiser))]):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(f"{_HOOK}_{i}", recurse=False)

    def latents(self, seeds: Sequence[int]) -> Tensor:
        """Final latents of `seeds`, from which `products` goes back. Once only."""
        with self._spill.saving():
            return self.sampler.latents(seeds)

    def products(self, latents: Tensor, adjoints: Sequence[Tensor]) -> NDArray[np.float32]:
        """(projections, images, units, steps, steps): inner products of each step's adjoint with the values up to it.

        Args:
            adjoints: Of the final latents, one for each projection.
        """
        steps, units = self._gates.shape
        table = np.zeros((len(adjoints), len(latents), units, steps, steps), dtype=np.float32)
        given = [leaf for call in self._calls for leaf in call.given]
        owed = [_pulled([latents], [adjoint], given) for adjoint in adjoints]
        while self._calls:
            call = self._calls.pop()
            mine = [[row.pop() for _ in call.given][::-1] for row in owed]
            del given[len(given) - len(call.given) :]
            if any(adjoint is not None for row in mine for adjoint in row):
                found = self._backward(call, mine)
                for row, (entered, _) in zip(owed, found, strict=True):
                    for i, more in enumerate(_pulled(call.entered, entered, given)):
                        if more is not None:
                            before = row[i]
                            row[i] = more if before is None else before + more
                self._multiply(table, call, [taps for _, taps in found])
            if not call.branch:  # no earlier call reads what this step's units gave
                for branch in range(self.sampler.rhythm.branches):
                    for i in range(units):
                        self._values.pop((call.step, branch, i), None)
        return table

    def call_again(self, call: _Call) -> tuple[list[Tensor], list[Tensor]]:
        """Makes a call with gradients: the tensors it returns and, as leaves, those of its arguments at `places`."""
        arguments = list(call.arguments)
        leaves = [arguments[i].detach().requires_grad_() for i in call.places]
        for i, leaf in zip(call.places, leaves, strict=True):
            arguments[i] = leaf.clone()  # so that it may be written into
        args, kwargs = tree_unflatten(arguments, call.spec)
        self._taps = [[] for _ in self._layout.units]
        self._again = call
        try:
            with torch.enable_grad(), self._spill.saving():
                output = call.forward(*args, **kwargs)
        finally:
            self._again = None
        return _tensors(tree_flatten(output)[0]), leaves

    def weigh(self) -> tuple[int, int]:
        """Bytes of one image: what gradients of a denoiser call take, and the units' values of a step."""
        values = 0
        for branch, (args, kwargs) in enumerate(self.sampler.first_calls[0]):
            flat, spec = tree_flatten((args, kwargs))
            registry = HookRegistry.check_if_exists_or_initialize(self.sampler.denoiser)
            forward = registry.get_hook(_HOOK + "_call").fn_ref.original_forward  # type: ignore[union-attr]
            assert forward is not None, "set by the registry"
            output = self.call_again(_Call(0, branch, forward, flat, spec, [], [], []))
            values += sum(tap.numel() * tap.element_size() for unit in self._taps for tap in unit)
            self._taps = []
            del output
        return self._spill.most_held + self._spill.most_stored, values

    def _backward(
        self, call: _Call, adjoints: Sequence[Sequence[Tensor | None]]
    ) -> list[tuple[list[Tensor | None], list[Tensor | None]]]:
        """Of each projection, the adjoints of what entered the call and of its taps, from those of what it returned."""
        outputs, leaves = self.call_again(call)
        taps = [tap for unit in self._taps for tap in unit]
        reached = [i for i, output in enumerate(outputs) if output.requires_grad]
        found: list[tuple[list[Tensor | None], list[Tensor | None]]] = []
        for k, row in enumerate(adjoints):
            weights = [torch.zeros_like(outputs[i]) if row[i] is None else row[i] for i in reached]
            grads = torch.autograd.grad(
                [outputs[i] for i in reached], [*leaves, *taps], weights,
                retain_graph=k + 1 < len(adjoints), allow_unused=True,
            )  # fmt: skip
            found.append((list(grads[: len(leaves)]), list(grads[len(leaves) :])))
        return found

    def _multiply(
        self, table: NDArray[np.float32], call: _Call, adjoints: Sequence[list[Tensor | None]]
    ) -> None:
        """Adds the products of a call. A unit's value of a step is all that it gives in all of the step's calls."""
        images = table.shape[1]
        place = 0
        for i, unit in enumerate(self._taps):
            for leaf, tap in enumerate(unit):
                rows = [row[place] for row in adjoints]
                place += 1
                if all(row is None for row in rows):
                    continue
                u = torch.stack([_by_image(tap if row is None else row, images) for row in rows], 1)
                for step in range(call.step + 1):
                    value = _by_image(self._values[step, call.branch, i][leaf].get(), images)
                    table[:, :, i, call.step, step] += torch.bmm(u, value[..., None])[..., 0].T.cpu().numpy()
        self._taps = []

    # What the hooks ask for.

    def listen(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Makes a denoiser call without gradients, and notes it."""
        flat, spec = tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
        entered = [flat[i] for i in places]
        for i in places:
            flat[i] = flat[i].detach().clone()
        # Containers are new for every call: some models take things out of those they are given.
        args, kwargs = tree_unflatten(flat, spec)
        with torch.no_grad():
            leaves, output_spec = tree_flatten(forward(*args, **kwargs))
        now = self._clock.now
        call = _Call(now.step, now.branch, forward, flat, spec, places, entered, [])
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                call.given.append(leaf.detach().requires_grad_())
                leaves[i] = call.given[-1].clone()  # so that the pipeline may write into it
        self._calls.append(call)
        return tree_unflatten(leaves, output_spec)

    def run(
        self, tap: _Tap, forward: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict
    ) -> Any:
        """Runs a unit, or what stands for it: once to keep its value, and again with its taps."""
        call, unit, i = self._again, tap.unit, tap.index
        if unit.guidance:
            return self._run_halves(tap, forward, args, kwargs)
        if call is not None and self._gates[call.step, i]:
            leaves, spec = tree_flatten(forward(*args, **kwargs))
            return tree_unflatten(self._tapped(i, leaves), spec)
        if call is not None:
            value = self._recall(tap, call.step, call.branch)
            return passed(unit, entering(unit, module, args, kwargs), value) if self._residual else value
        now = self._clock.now
        # Of the input as it is now: the unit may write into it.
        streams = [x.clone() for x in entering(unit, module, args, kwargs)] if self._residual else []
        output = forward(*args, **kwargs)
        self._keep(tap, now.step, now.branch, added(unit, streams, output) if self._residual else output)
        if self._gates[now.step, i]:
            return output
        value = self._recall(tap, now.step, now.branch)
        return passed(unit, streams, value) if self._residual else value

    def _run_halves(self, tap: _Tap, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """The same for guidance: the whole batch is computed, and its other half stands for what a reused difference makes of it."""
        call, unit = self._again, tap.unit
        now = self._clock.now if call is None else call
        output = forward(*args, **kwargs)
        if call is None:
            self._keep(tap, now.step, now.branch, difference(unit, output))
        if not self._gates[now.step, tap.index]:
            more = self._recall(tap, now.step, now.branch)
        elif call is None:
            return output
        else:
            leaves, spec = tree_flatten(difference(unit, output))
            more = tree_unflatten(self._tapped(tap.index, leaves), spec)
        return both(unit, only_conditioned(unit, output), more)

    def _keep(self, tap: _Tap, step: int, branch: int, value: Any) -> None:
        leaves, spec = tree_flatten(value)
        self._values[step, branch, tap.index] = [
            self._spill.keep(x, self._spare) for x in leaves if isinstance(x, Tensor)
        ]
        tap.forms[branch] = [None if isinstance(x, Tensor) else x for x in leaves], spec
        tap.places[branch] = [j for j, x in enumerate(leaves) if isinstance(x, Tensor)]

    def _recall(self, tap: _Tap, step: int, branch: int) -> Any:
        """What is reused in place of a unit's value; with taps in a call that is made again.

        Without gradients of its own: what a later reuse of the same value does is an error of that later call.
        """
        began = max(s for s in self.sampler.rhythm.stages if s <= step)
        kind = str(self._kinds[step, tap.index])
        history = History(KINDS[kind])
        for s in [s for s in range(began, step) if self._gates[s, tap.index]][-KINDS[kind] - 1 :]:
            history.store(s, [kept.get() for kept in self._values[s, branch, tap.index]])
        leaves, spec = tap.forms[branch]
        leaves = list(leaves)
        for place, value in zip(tap.places[branch], history.recall(step, kind), strict=True):
            leaves[place] = value
        return tree_unflatten(leaves if self._again is None else self._tapped(tap.index, leaves), spec)

    def _tapped(self, index: int, leaves: list[Any]) -> list[Any]:
        """`leaves` with a differentiable zero on each tensor, of which memory holds one element."""
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                tap = leaf.new_zeros(()).expand(leaf.shape).requires_grad_()
                self._taps[index].append(tap)
                leaves[i] = leaf + tap
        return leaves


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _pulled(
    outputs: Sequence[Tensor], adjoints: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """The adjoints of `inputs` through the pipeline's own arithmetic; None where there are none."""
    pairs = [(o, a) for o, a in zip(outputs, adjoints, strict=True) if a is not None and o.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    reached, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(reached, inputs, weights, retain_graph=True, allow_unused=True))


def _by_image(x: Tensor, images: int) -> Tensor:
    """(images, elements) in float32 at least. Rows r and r + images are the two halves of guidance for image r."""
    x = x.reshape(-1, images, x[0].numel()).transpose(0, 1).flatten(1)
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _Listen(ModelHook):
    """Around the denoiser."""

    def __init__(self, trace: Trace):
        super().__init__()
        self._trace = trace

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._trace.listen(self.fn_ref.original_forward, args, kwargs)  # type: ignore[arg-type]


class _Tap(ModelHook):
    """Around a unit; `forms` and `places` say of each branch what its value consists of, and where the tensors are."""

    def __init__(self, trace: Trace, index: int, unit: Unit):
        super().__init__()
        self._trace, self.index, self.unit = trace, index, unit
        self.forms: dict[int, tuple[list[Any], TreeSpec]] = {}
        self.places: dict[int, list[int]] = {}

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._trace.run(self, self.fn_ref.original_forward, module, args, kwargs)  # type: ignore[arg-type]

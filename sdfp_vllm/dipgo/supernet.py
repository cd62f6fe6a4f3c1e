"""The denoiser with backup connections: every unit may give what it gave in the call before (DiP-GO's SuperNet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sdfp_vllm.dipgo.clock import Clock
from sdfp_vllm.dipgo.layout import Layout, Unit
from sdfp_vllm.dipgo.sampling import Sampler
from sdfp_vllm.dipgo.streams import added, entering, passed

_HOOK = "sdfp_dipgo_supernet"


class SuperNet:
    """Runs generations in which unit i of call t puts out g * current + (1 - g) * backup, with gate g = gates[t, i].

    The blend is the next call's backup (arXiv 2410.16942, section 3.2; there g0 = 1 - g). With
    residual reuse the blend is of what the unit adds to its streams. All units run, so that closed
    gates have gradients too. Calls are gradient-checkpointed: memory holds the units' outputs of
    all calls and the activations of one. Each branch of a step has backups of its own, and a denoiser that takes over
    has none yet.

    Use as a context manager; the denoiser is as before afterwards.

    Args:
        checkpointed: False keeps all activations of all calls, and computes each once only.
    """

    def __init__(self, sampler: Sampler, layout: Layout, reuse: str, checkpointed: bool = True):
        self._sampler, self._layout, self._residual = sampler, layout, reuse == "residual"
        self._checkpointed = checkpointed
        self._gates: Tensor | None = None
        self._backups: dict[int, list[list[Tensor]]] = {}  # of each branch

    def __enter__(self) -> SuperNet:
        self.clock = Clock(self._sampler.rhythm, lambda _: self._backups.clear())
        for stage, denoiser in enumerate(self._sampler.denoisers):
            blends = [_Blend(unit, self._residual) for unit in self._layout.units]
            for module, blend in zip(self._layout.modules(denoiser), blends, strict=True):
                HookRegistry.check_if_exists_or_initialize(module).register_hook(blend, _HOOK)
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            registry.register_hook(_Call(self, blends), _HOOK + "_call")
            registry.register_hook(self.clock.hook(stage), _HOOK + "_clock")
        return self

    def __exit__(self, *_: object) -> None:
        for denoiser in self._sampler.denoisers:
            registry = HookRegistry.check_if_exists_or_initialize(denoiser)
            registry.remove_hook(_HOOK + "_clock", recurse=False)
            registry.remove_hook(_HOOK + "_call", recurse=False)
            for module in self._layout.modules(denoiser):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK, recurse=False)
        self._backups.clear()

    def latents(self, seeds: Sequence[int], gates: Tensor) -> Tensor:
        """Final latents (images, ...) as a differentiable function of `gates` (steps, units); first rows are not read."""
        self._gates = gates
        try:
            return self._sampler.latents(seeds)
        finally:
            self._backups.clear()

    def _run_call(self, blends: list[_Blend], forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One denoiser call: backups in, prediction and new backups out, as a function of tensors only."""
        step, branch, gates = self.clock.step, self.clock.now.branch, self._gates
        assert gates is not None
        first = step in self._sampler.rhythm.stages
        backups: list[list[Tensor]] = [[] for _ in blends] if first else self._backups[branch]
        sizes: list[int] = []

        def call(row: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            given = iter(flat)
            for i, blend in enumerate(blends):
                blend.gate = None if first else row[i]
                blend.backup = [next(given) for _ in backups[i]]
            output = forward(*args, **kwargs)
            leaves, self._spec = tree_flatten(output)
            sizes[:] = [len(blend.kept) for blend in blends]
            kept = [leaf for blend in blends for leaf in blend.kept]
            for blend in blends:
                blend.backup, blend.kept = [], []
            return (*leaves, *kept)

        flat = [leaf for unit in backups for leaf in unit]
        if self._checkpointed and torch.is_grad_enabled():
            result = checkpoint(call, gates[step], *flat, use_reentrant=False)
        else:
            result = call(gates[step], *flat)
        head = len(result) - sum(sizes)
        rest = iter(result[head:])
        self._backups[branch] = [[next(rest) for _ in range(size)] for size in sizes]
        return tree_unflatten(list(result[:head]), self._spec)


class _Call(ModelHook):
    """Around the denoiser."""

    def __init__(self, net: SuperNet, blends: list[_Blend]):
        super().__init__()
        self._net, self._blends = net, blends

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._net._run_call(self._blends, self.fn_ref.original_forward, args, kwargs)


class _Blend(ModelHook):
    """Around a unit: its output, blended with the backup by the gate."""

    def __init__(self, unit: Unit, residual: bool):
        super().__init__()
        self.gate: Tensor | None = None
        self.backup: list[Tensor] = []
        self.kept: list[Tensor] = []
        self._unit, self._residual = unit, residual

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Of the input as it is now, and copies of what is passed on: others write into either.
        streams = [x.clone() for x in entering(self._unit, module, args, kwargs)] if self._residual else []
        output = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]  # set by the registry
        leaves, spec = tree_flatten(added(self._unit, streams, output) if self._residual else output)
        # Beside tensors a block may give None, for a stream that nothing reads any more.
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if self.gate is None:
            self.kept = [leaves[i].clone() for i in places]
            return output
        self.kept = [
            self.gate * leaves[i] + (1 - self.gate) * old for i, old in zip(places, self.backup, strict=True)
        ]
        for i, kept in zip(places, self.kept, strict=True):
            leaves[i] = kept.clone()
        blended = tree_unflatten(leaves, spec)
        return passed(self._unit, streams, blended) if self._residual else blended

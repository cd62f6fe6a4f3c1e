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
from sdfp_vllm.dipgo.layout import Layout
from sdfp_vllm.dipgo.runtime import input_of
from sdfp_vllm.dipgo.sampling import Sampler

_HOOK = "sdfp_dipgo_supernet"


class SuperNet:
    """Runs generations in which unit i of call t puts out g * current + (1 - g) * backup, with gate g = gates[t, i].

    The blend is the next call's backup (arXiv 2410.16942, section 3.2; there g0 = 1 - g). With
    residual reuse the blend is of what the unit adds to its input. All units run, so that closed
    gates have gradients too. Calls are gradient-checkpointed: memory holds the units' outputs of
    all calls and the activations of one.

    Use as a context manager; the denoiser is as before afterwards.

    Args:
        checkpointed: False keeps all activations of all calls, and computes each once only.
    """

    def __init__(self, sampler: Sampler, layout: Layout, reuse: str, checkpointed: bool = True):
        self._sampler, self._layout, self._residual = sampler, layout, reuse == "residual"
        self._checkpointed = checkpointed
        self._units = layout.modules(sampler.denoiser)
        self._gates: Tensor | None = None
        self._taps: Tensor | None = None
        self._backups: list[list[Tensor]] = []

    def __enter__(self) -> SuperNet:
        self.clock = Clock(self._sampler.scheduler.timesteps, lambda _: self._backups.clear())
        self._blends = [_Blend(self, i, self._residual) for i in range(len(self._units))]
        for module, blend in zip(self._units, self._blends, strict=True):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(blend, _HOOK)
        registry = HookRegistry.check_if_exists_or_initialize(self._sampler.denoiser)
        registry.register_hook(_Call(self), _HOOK + "_call")
        registry.register_hook(self.clock, _HOOK + "_clock")
        return self

    def __exit__(self, *_: object) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(self._sampler.denoiser)
        registry.remove_hook(_HOOK + "_clock", recurse=False)
        registry.remove_hook(_HOOK + "_call", recurse=False)
        for module in self._units:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK, recurse=False)
        self._backups.clear()

    def latents(self, seeds: Sequence[int], gates: Tensor) -> Tensor:
        """Final latents (images, ...) as a differentiable function of `gates` (calls, units); row 0 is not read."""
        self._gates = gates
        try:
            return self._sampler.latents(seeds)
        finally:
            self._backups.clear()

    def _run_call(self, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One denoiser call: backups in, prediction and new backups out, as a function of tensors only."""
        step, gates, backups = self.clock.step, self._gates, list(self._backups)
        assert gates is not None
        sizes: list[int] = []

        def call(row: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            given = iter(flat)
            for i, blend in enumerate(self._blends):
                blend.gate = row[i] if step else None
                blend.backup = [next(given) for _ in backups[i]] if step else []
            output = forward(*args, **kwargs)
            leaves, self._spec = tree_flatten(output)
            sizes[:] = [len(blend.kept) for blend in self._blends]
            kept = [leaf for blend in self._blends for leaf in blend.kept]
            for blend in self._blends:
                blend.backup, blend.kept = [], []
            return (*leaves, *kept)

        flat = [leaf for unit in backups for leaf in unit]
        if self._checkpointed and torch.is_grad_enabled():
            result = checkpoint(call, gates[step], *flat, use_reentrant=False)
        else:
            result = call(gates[step], *flat)
        head = len(result) - sum(sizes)
        rest = iter(result[head:])
        self._backups = [[next(rest) for _ in range(size)] for size in sizes]
        return tree_unflatten(list(result[:head]), self._spec)


class _Call(ModelHook):
    """Around the denoiser."""

    def __init__(self, net: SuperNet):
        super().__init__()
        self._net = net

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self._net._run_call(self.fn_ref.original_forward, args, kwargs)


class _Blend(ModelHook):
    """Around a unit: its output, blended with the backup by the gate."""

    def __init__(self, net: SuperNet, index: int, residual: bool):
        super().__init__()
        self.gate: Tensor | None = None
        self.backup: list[Tensor] = []
        self.kept: list[Tensor] = []
        self._residual = residual

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Of the input as it is now, and copies of what is passed on: others write into either.
        entering = input_of(args, kwargs).clone() if self._residual else None
        output = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]  # set by the registry
        leaves, spec = tree_flatten(output if entering is None else output - entering)
        if self.gate is None:
            self.kept = [leaf.clone() for leaf in leaves]
            return output
        self.kept = [
            self.gate * now + (1 - self.gate) * old for now, old in zip(leaves, self.backup, strict=True)
        ]
        blended = tree_unflatten([leaf.clone() for leaf in self.kept], spec)
        return blended if entering is None else entering + blended

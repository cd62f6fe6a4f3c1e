"""Entering a kept layer, or the final norm, through a bridge over the dropped layers before it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sdfp_vllm.engine.upstream.symbols import GemmaRMSNorm, RMSNorm
from sdfp_vllm.kernels.skip_residual_rms_norm import skip_residual_rms_norm
from sdfp_vllm.plan.bridge import Bridge

# The children, feed-forward parts aside, of the decoder layers known to begin with
# `input_layernorm(hidden, residual)`, which adds, normalises and returns both: Llama's shape and Gemma's.
_KNOWN_LAYERS = (
    {"input_layernorm", "self_attn", "post_attention_layernorm"},
    {
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    },
)
_FEED_FORWARD = {"mlp", "block_sparse_moe"}


class _Held(nn.Module):
    """Holds a bridge's tensors as buffers, which follow the module to a device."""

    def __init__(self, bridge: Bridge):
        super().__init__()
        self._names = tuple(bridge.tensors())
        for name, tensor in bridge.tensors().items():
            self.register_buffer(f"bridge_{name}", tensor, persistent=False)

    @property
    def bridge(self) -> Bridge:
        return Bridge(**{name: getattr(self, f"bridge_{name}") for name in self._names})


class BridgeStep(_Held):
    """A bridge as a step of its own, for whatever the fused entry does not know."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, None]:
        """(branch output, residual) [T, H] each -> (bridged residual stream, None), as after an embedding."""
        return self.bridge.apply(hidden if residual is None else hidden + residual), None


class BridgedNorm(_Held):
    """A norm that adds, bridges and normalises in one kernel; called like the norm it stands for."""

    def __init__(self, bridge: Bridge, norm: nn.Module):
        super().__init__(bridge)
        self.norm: Any = norm  # read late: weights may be loaded anew
        self._offset = 1.0 if type(norm) is GemmaRMSNorm else 0.0

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Branch output and residual [T, H] -> (normed rows, the residual, written in place)."""
        normed = skip_residual_rms_norm(
            hidden,
            residual,
            self.norm.weight.data,
            self.norm.variance_epsilon,
            self.bridge,
            weight_offset=self._offset,
        )
        return normed, residual


def entered_through(bridge: Bridge, module: Any) -> list[nn.Module]:
    """Steps that enter `module`, a decoder layer or the final norm, through `bridge`.

    A known layer gets one step: itself, sharing every weight, with a `BridgedNorm` in its
    `input_layernorm`'s place. Anything else gets the bridge as a step before it.
    """
    if _plain(module):
        return [BridgedNorm(bridge, module)]
    norm = getattr(module, "input_layernorm", None)
    children = {name for name, _ in module.named_children()}
    if norm is None or not _plain(norm) or children - _FEED_FORWARD not in _KNOWN_LAYERS:
        return [BridgeStep(bridge), module]
    layer = copy.copy(module)
    layer._modules = {**module._modules, "input_layernorm": BridgedNorm(bridge, norm)}
    return [layer]


def _plain(norm: Any) -> bool:
    """Whether `norm` is vLLM's RMSNorm over whole rows, with a weight."""
    if type(norm) is RMSNorm:
        return norm.has_weight and norm.variance_size_override is None
    return type(norm) is GemmaRMSNorm

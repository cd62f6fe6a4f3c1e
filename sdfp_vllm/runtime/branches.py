"""One residual branch of a decoder layer, run without the other, on vLLM's fused residual convention.

A pre-norm layer of vLLM takes (branch output, residual) from what ran before it; each of its two
norms adds the pair, normalises the sum and hands the sum on as the residual. So a branch is
its norm followed by its module, whatever ran before: h, r -> module(norm(h + r)), h + r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.keep import Branch

_NORM = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
_FEED_FORWARD = ("mlp", "block_sparse_moe")


class _Branch(nn.Module):
    """Norm and module of one branch, shared with the layer they belong to."""

    def __init__(self, norm: nn.Module, module: nn.Module):
        super().__init__()
        self.norm, self.module = norm, module

    def enter(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(branch output, residual or None at the first step) [T, H] -> (normed rows, residual)."""
        return (self.norm(hidden), hidden) if residual is None else self.norm(hidden, residual)


class AttentionBranch(_Branch):
    """A layer's attention alone; called like the layer."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.enter(hidden, residual)
        return self.module(positions=positions, hidden_states=normed), residual


class MlpBranch(_Branch):
    """A layer's MLP, or experts, alone; called like the layer."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual = self.enter(hidden, residual)
        return self.module(normed), residual


def branch_of(layer: Any, index: int, branch: Branch) -> nn.Module:
    """The attention or the MLP of decoder layer `index`, sharing every weight with it.

    Raises:
        SdfpError: If the layer is not of Llama's pre-norm shape, so that a branch is not norm and module.
    """
    children = {name for name, _ in layer.named_children()}
    feed_forward = next((name for name in _FEED_FORWARD if name in children), "mlp")
    if children != {*_NORM.values(), "self_attn", feed_forward}:
        raise SdfpError(
            f"decoder layer {index} ({type(layer).__name__})",
            f"has the parts {sorted(children)}: its {branch} cannot run by itself",
            "Make a plan with `sdfp plan MODEL --selector fit`, which keeps whole layers.",
        )
    norm = getattr(layer, _NORM[branch])
    if branch == "attention":
        return AttentionBranch(norm, layer.self_attn)
    return MlpBranch(norm, getattr(layer, feed_forward))

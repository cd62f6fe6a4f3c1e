"""A decoder layer as the draft has it: whole or one residual branch, on full or rounded weights.

A pre-norm layer of vLLM takes (branch output, residual) from what ran before it; each of its two
norms adds the pair, normalises the sum and hands the sum on as the residual. So a branch is
its norm followed by its module, whatever ran before: h, r -> module(norm(h + r)), h + r.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sdfp_vllm.engine.draft.twins import rounded_branch
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.keep import Branch, KeepSet

_NORM = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
# What layers call the modules of their branches; `attn` is gpt-oss's.
_ATTENTION = ("self_attn", "attn")
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


def seen(layer: Any, index: int, view: KeepSet) -> nn.Module:
    """Decoder layer `index` as `view` has it, sharing every weight with it but those that are rounded.

    Raises:
        SdfpError: If the layer is not of Llama's pre-norm shape and one of its branches is left out, or it has no
            weights to round where the view rounds.
    """
    runs = view.branches(index)
    if len(runs) == 1:
        (branch,) = runs
        norm, module = _parts(layer, index, branch)
        module = _at(module, index, branch, view)
        return AttentionBranch(norm, module) if branch == "attention" else MlpBranch(norm, module)
    names: dict[Branch, str] = {"attention": _named(layer, _ATTENTION), "mlp": _named(layer, _FEED_FORWARD)}
    changed = {name: _at(getattr(layer, name), index, b, view) for b, name in names.items()
               if view.precision(index, b) != "full"}  # fmt: skip
    if not changed:
        return layer
    made = copy.copy(layer)
    made._modules = {**layer._modules, **changed}
    return made


def _at(module: nn.Module, index: int, branch: Branch, view: KeepSet) -> nn.Module:
    precision = view.precision(index, branch)
    return module if precision == "full" else rounded_branch(module, index, branch, precision)


def _named(layer: nn.Module, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in layer._modules), names[0])


def _parts(layer: Any, index: int, branch: Branch) -> tuple[nn.Module, nn.Module]:
    """Norm and module of a layer's branch."""
    children, feed_forward = set(layer._modules), _named(layer, _FEED_FORWARD)
    if children != {*_NORM.values(), "self_attn", feed_forward}:
        raise SdfpError(
            f"decoder layer {index} ({type(layer).__name__})",
            f"has the parts {sorted(children)}: its {branch} cannot run by itself",
            "Make a plan with `sdfp plan MODEL --selector fit`, which keeps whole layers.",
        )
    return getattr(layer, _NORM[branch]), getattr(
        layer, "self_attn" if branch == "attention" else feed_forward
    )

"""Twins: the target's modules on rounded weights. All but the linears is shared: norms, rotary, attention, KV cache."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from sdfp_vllm.engine.draft.rounded_linear import RoundedLinear
from sdfp_vllm.engine.draft.rounded_weights import copy_of
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.view import Branch, Precision


class RoundedMethod:
    """Stands in for a linear's `quant_method`: the product runs on the rounded copy."""

    def __init__(self, rounded: RoundedLinear):
        self.rounded = rounded

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self.rounded(x)
        return out if bias is None else out.add_(bias)  # in place: vLLM may keep a wider bias


def twin(module: nn.Module) -> nn.Module:
    """`module` with every linear that holds a rounded copy replaced by one that runs on it; itself if none does."""
    rounded = copy_of(module)
    if rounded is not None:
        made: Any = copy.copy(module)
        made.quant_method = RoundedMethod(rounded)
        return made
    children = {name: child and twin(child) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    made = copy.copy(module)
    made._modules = children
    if hasattr(module, "_enable_aux_cuda_stream"):
        made._enable_aux_cuda_stream = False  # a LoRA layer looks itself up by name, and finds the target's
    return made


def rounded_branch(module: nn.Module, index: int, branch: Branch, precision: Precision) -> nn.Module:
    """The twin of decoder layer `index`'s attention or MLP.

    Raises:
        SdfpError: If none of its linears has a rounded copy: the model is quantised itself, or mixes experts.
    """
    made = twin(module)
    if made is module:
        raise SdfpError(
            f"decoder layer {index}",
            f"has no {branch} weights that could be rounded to {precision}: they are quantised already, or experts",
            'Serve it with {"precision": "full"} in speculative_config, or plan with `--precision full`.',
        )
    return made


def copies_of(draft: nn.Module) -> int:
    """Bytes of the rounded copies that a draft runs on, each counted once."""
    methods = (getattr(m, "quant_method", None) for m in draft.modules())
    copies = {id(m.rounded): m.rounded for m in methods if isinstance(m, RoundedMethod)}
    return sum(made.nbytes for made in copies.values())

"""The target's linears in lower precision, computed as the engine computes them: for rollouts and for timing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.engine.draft.cpu_linear import engine_linear
from sdfp_vllm.engine.draft.rounded_linear import RoundedLinear, refusal
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.view import ROUNDED, Precision

_TRIES = 5
# What the engine computes as one product; their weights are stacked in this order.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_linears(branch: nn.Module) -> list[Tensor]:
    """Weights [N, K] of a branch's products, those that read the same rows stacked as in the engine."""
    linears = {name: m for name, m in branch.named_modules() if isinstance(m, nn.Linear)}
    weights = []
    for names in _FUSED:
        if all(name in linears for name in names):
            weights.append(torch.cat([linears.pop(name).weight.detach() for name in names]))
    return weights + [linear.weight.detach() for linear in linears.values()]


def layer_products(layer: Any) -> list[Tensor]:
    """Weights [N, K] of all products of a decoder layer."""
    return [weight for branch in (layer.self_attn, layer.mlp) for weight in fused_linears(branch)]


def rounded_product(weight: Tensor, precision: Precision) -> Callable[[Tensor], Tensor]:
    """The engine's product with `weight` [N, K] at `precision`: [M, K] -> [M, N]."""
    return RoundedLinear(weight.detach(), None, precision, name="a draft's cost")


def rounded_copy_of(weight: Tensor, bias: Tensor | None, precision: Precision) -> nn.Module:
    """A linear on rounded copies of `weight` [N, K]."""
    return RoundedLinear(weight.detach(), bias, precision, name="a draft's rollout")


def rounded_copy(module: nn.Module, precision: Precision) -> nn.Module:
    """A copy of `module` that shares everything with it but its linears, which run on rounded weights."""
    if isinstance(module, nn.Linear):
        return rounded_copy_of(module.weight, module.bias, precision)
    children = {name: child and rounded_copy(child, precision) for name, child in module._modules.items()}
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    made: Any = copy.copy(module)
    made._modules = children
    return made


def usable_precisions(weights: Sequence[Tensor], dtype: torch.dtype, asked: str) -> list[Precision]:
    """The rounded precisions that this machine has kernels for: all that are faster than none, or the one asked for.

    Args:
        weights: [N, K] each, of a layer.
        asked: "auto", "full" (none), or a precision.

    Raises:
        SdfpError: If one is asked for by name that there is no kernel for.
    """
    if asked == "full" or (asked == "auto" and find_spec("vllm") is None):
        return []
    shapes = sorted({tuple(w.shape) for w in weights})
    found: list[Precision] = []
    for precision in ROUNDED if asked == "auto" else (asked,):
        why = next((why for n, k in shapes if (why := refusal(precision, dtype, n, k)) is not None), None)  # type: ignore[arg-type]
        if why is None:
            found.append(precision)  # type: ignore[arg-type]
        elif asked != "auto":
            raise SdfpError(
                f"--precision {asked}",
                f"has no kernel on this machine for {str(dtype).removeprefix('torch.')}: {why}",
                "Use --precision auto, which takes what there is, or full.",
            )
    if asked != "auto":
        return found
    largest = max(weights, key=Tensor.numel).to(dtype)
    full = _quickest(engine_linear(largest), largest)
    return [p for p in found if _quickest(rounded_product(largest, p), largest) < full]


def _quickest(product: Callable[[Tensor], Tensor], weight: Tensor) -> float:
    """Seconds of one row through a product, best of a few."""
    x = weight.new_ones(1, weight.shape[1])
    best = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        product(x).sum().item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return best

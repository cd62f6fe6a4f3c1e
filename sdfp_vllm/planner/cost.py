"""What a draft step and a verification cost on this machine, measured on the model's own weights.

Only the work that an engine does as well is timed: matrix products (fused as the engine fuses them, and through the
kernel that it picks, for every precision), and attention over a K/V context, without the Python of a model's
forward. Weights are swept layer by layer, as a forward does, so that they come from memory and not from the
processor's cache. What the engine adds between the products is measured on the engine itself (`engine_overheads.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.common.machine import processor
from sdfp_vllm.engine.draft.cpu_linear import engine_linear, engine_linear_name
from sdfp_vllm.kernels.skip_residual_rms_norm import skip_residual_rms_norm
from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.view import Precision
from sdfp_vllm.planner.rounded import fused_linears, rounded_product
from sdfp_vllm.planner.stack import DecoderStack

# Beyond the rows of one request: enough to place where a growing batch turns compute-bound.
BATCH_ROWS = (16, 32, 64)
# Layers are sampled until their weights outgrow any processor cache; packing copies them.
_SWEEP_BYTES = 320 << 20
_MIN_REPEATS, _MAX_REPEATS = 3, 15
_BRIDGE_REPEATS = 20

Part = Callable[[Tensor], Tensor]


@torch.no_grad()
def measure_costs(
    stack: DecoderStack,
    *,
    precisions: Iterable[Precision] = (),
    context: int = 256,
    max_rows: int = 9,
    batch_rows: Sequence[int] = BATCH_ROWS,
    seconds: float = 6.0,
    dtype: torch.dtype | None = None,
) -> Costs:
    """Times branches and head at 1..`max_rows` rows and at `batch_rows`, in full and at `precisions`.

    Best of the repeats, row counts interleaved, after one warm-up sweep: whatever else the machine
    does can only add time, and a median keeps it in.

    Args:
        precisions: Those that this machine has kernels for (`planner/rounded.py`).
        context: K/V positions that attention reads.
        seconds: Measuring stops after the repeat in which they are used up (3 to 15 are made).
        dtype: Times the model as if it were in this dtype; None: its own.
    """
    rows = sorted({*range(1, max_rows + 1), *batch_rows})
    weight = next(stack.head.parameters())
    dtype = dtype or weight.dtype
    wanted: list[Precision] = ["full", *precisions]
    parts = _parts(stack, wanted, context, dtype)
    x = {m: torch.randn(m, stack.config.hidden_size, dtype=dtype, device=weight.device) for m in rows}
    times: dict[tuple[str, Precision], list[float]] = {key: [float("inf")] * len(rows) for key in parts}
    # One branch of all sampled layers, then the next: as many bytes lie between two visits to a weight as in a forward.
    for sweep in parts.values():
        _run(sweep, x[1])
    began = time.perf_counter()
    for repeat in range(_MAX_REPEATS):
        if repeat >= _MIN_REPEATS and time.perf_counter() - began > seconds:
            break
        for at, m in enumerate(rows):
            for (name, precision), sweep in parts.items():
                took = _timed(lambda rows_of: _run(sweep, rows_of), x[m])  # noqa: B023  # called at once
                of = len(sweep) if name == "head" else len(_sample(stack))
                times[name, precision][at] = min(times[name, precision][at], took / of)
    columns: dict[str, dict[Precision, list[float]]] = {"attention": {}, "mlp": {}, "head": {}}
    for (name, precision), column in times.items():
        columns[name][precision] = column
    for branch in ("attention", "mlp"):
        # What cannot be rounded (experts) runs in full at every precision.
        columns[branch] = {p: columns[branch].get(p, columns[branch]["full"]) for p in wanted}
    return Costs(
        rows=rows,
        attention=columns["attention"],
        mlp=columns["mlp"],
        head=columns["head"],
        num_layers=stack.num_layers,
        device=_device_name(weight.device),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _run(sweep: Sequence[Part], x: Tensor) -> Tensor:
    for part in sweep:
        part(x)
    return x


def _parts(
    stack: DecoderStack, precisions: Sequence[Precision], context: int, dtype: torch.dtype
) -> dict[tuple[str, Precision], list[Part]]:
    """What is timed: by branch or head, and precision."""
    parts: dict[tuple[str, Precision], list[Part]] = {}
    layers: list[Any] = [stack.layers[i] for i in _sample(stack)]
    for precision in precisions:
        if precision == "full" or stack.can_round("attention"):
            parts["attention", precision] = [
                part
                for layer in layers
                for part in (
                    *(_product(w, precision, dtype) for w in fused_linears(layer.self_attn)),
                    _attention_part(stack, layer, context, dtype),
                )
            ]
        if stack.can_round("mlp"):
            parts["mlp", precision] = [
                _product(w, precision, dtype) for layer in layers for w in fused_linears(layer.mlp)
            ]
        elif precision == "full":
            # A mixture of experts: which weights are read depends on the rows.
            parts["mlp", precision] = [_experts(layer.mlp) for layer in layers]
        if precision in ("full", "int8"):
            parts["head", precision] = [head_part(stack, _head_weight(stack), precision, dtype)]
    return parts


def head_part(stack: DecoderStack, weight: Tensor, precision: Precision, dtype: torch.dtype) -> Part:
    """Final norm, product with `weight` [M, H], argmax."""
    product, norm = _product(weight, precision, dtype), stack.norm
    return lambda x: product(norm(x.to(weight.dtype)).to(dtype)).argmax(-1)


def _product(weight: Tensor, precision: Precision, dtype: torch.dtype) -> Part:
    """The engine's product with `weight` [N, K], fed rows of its own width, made of the hidden states'."""
    weight = weight.to(dtype)
    width = weight.shape[1]
    linear = engine_linear(weight) if precision == "full" else rounded_product(weight, precision)

    def part(x: Tensor) -> Tensor:
        have = x.shape[1]
        return linear(x if have == width else x.repeat(1, -(-width // have))[:, :width])

    return part


def _experts(mlp: nn.Module) -> Part:
    own = next(mlp.parameters()).dtype
    return lambda x: mlp(x[None].to(own))


@torch.no_grad()
def measure_bridge_ms(stack: DecoderStack, bridge: Bridge) -> float:
    """Milliseconds of one bridge at one row: the op that the engine enters a layer with, best of many."""
    like = _head_weight(stack)
    held = bridge.to(device=like.device, dtype=like.dtype)
    residual, weight = like.new_ones(1, bridge.hidden_size), like.new_ones(bridge.hidden_size)

    def enter(branch: Tensor) -> None:
        skip_residual_rms_norm(branch, residual, weight, 1e-6, held)

    return min(_timed(enter, torch.zeros_like(residual)) for _ in range(_BRIDGE_REPEATS))


def _sample(stack: DecoderStack) -> list[int]:
    """Evenly spread layers that together outgrow any cache, or all."""
    size = sum(p.numel() * p.element_size() for _, p in stack.layer_parameters(0))
    count = min(stack.num_layers, max(1, -(-_SWEEP_BYTES // size)))
    return [i * stack.num_layers // count for i in range(count)]


def _attention_part(stack: DecoderStack, layer: Any, context: int, dtype: torch.dtype) -> Part:
    heads, groups, dim = (
        stack.config.num_attention_heads,
        layer.self_attn.num_key_value_groups,
        layer.self_attn.head_dim,
    )
    device = _head_weight(stack).device
    k, v = (torch.randn(1, heads // groups, context, dim, dtype=dtype, device=device) for _ in range(2))

    def part(x: Tensor) -> Tensor:
        q = x.new_ones(1, heads, x.shape[0], dim)
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1)

    return part


def _head_weight(stack: DecoderStack) -> nn.Parameter:
    return next(stack.head.parameters())


def _timed(part: Callable[[Tensor], object], x: Tensor) -> float:
    """Milliseconds."""
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    part(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({processor()}), {engine_linear_name()} kernels"

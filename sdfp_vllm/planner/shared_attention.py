"""Attention as the draft has it in the engine: the full model's past, and its own short chain.

Plugged into transformers' attention interface, so that it serves every architecture whose
attention goes through it: grouped heads, sliding windows, score caps and sinks come as arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sdfp_vllm.planner.stack import DecoderStack

_ATTENTION = "sdfp_rollout"


@dataclass
class FullPass:
    """Full pass over one sequence: ordinary causal attention, K and V of every layer kept.

    `begin` is the position of its first token, where it was padded on the left: padding has no K/V here.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)  # layer -> [Hkv, T - begin, D]
    values: dict[int, Tensor] = field(default_factory=dict)
    begin: int = 0

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window, softcap, sinks
    ) -> Tensor:
        self.keys[layer], self.values[layer] = k[0], v[0]
        position = torch.arange(k.shape[2], device=k.device)
        seen = _within(position[:, None] - position, window)
        weights = _weights(_scores(q[0], k[0]) * scaling, seen, softcap, sinks).to(v.dtype)
        return (weights.flatten(1, 2) @ v[0]).view(1, q.shape[1], q.shape[2], -1)


@dataclass
class DraftRows:
    """Draft steps for many (sequence, start) rows at once, sorted by sequence.

    `chain[layer]` holds per step the K and V [Hkv, R, D] that the rows wrote in this round.
    """

    full: Sequence[FullPass]
    sequence: Tensor  # int64 [R]
    start: Tensor  # int64 [R], absolute positions
    chain: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def select(self, rows: Tensor) -> DraftRows:
        """Keeps the rows marked in `rows`, bool [R]."""
        chain = {i: [(k[:, rows], v[:, rows]) for k, v in steps] for i, steps in self.chain.items()}
        return DraftRows(self.full, self.sequence[rows], self.start[rows], chain)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window, softcap, sinks
    ) -> Tensor:
        steps = self.chain.setdefault(layer, [])
        steps.append((k[0], v[0]))
        own_k, own_v = (torch.stack(t, dim=2) for t in zip(*steps, strict=True))  # [Hkv, R, j + 1, D]
        out = torch.empty(q.shape[1], q.shape[2], v.shape[-1], dtype=v.dtype, device=v.device)
        low = 0
        for n, count in zip(
            *(t.tolist() for t in self.sequence.unique_consecutive(return_counts=True)), strict=True
        ):
            rows = slice(low, low + count)
            low += count
            out[:, rows] = self._attend_one(
                n, layer, rows, q[0], own_k, own_v, scaling, window, softcap, sinks
            )
        return out[None]

    def _attend_one(self, n, layer, rows, q, own_k, own_v, scaling, window, softcap, sinks) -> Tensor:
        """Attention of one sequence's rows: over its full-model K/V below start, then over the own chain."""
        full = self.full[n]
        past_k, past_v = full.keys[layer], full.values[layer]
        q, own_k, own_v, start = q[:, rows], own_k[:, rows], own_v[:, rows], self.start[rows, None]
        step = own_k.shape[2] - 1
        past = torch.arange(full.begin, full.begin + past_k.shape[1], device=q.device)
        back = torch.arange(step, -1, -1, device=q.device).expand(len(start), -1)  # distance to own keys
        seen = torch.cat(
            [(past < start) & _within(start + step - past, window), _within(back, window)], dim=1
        )
        grouped = q.view(own_k.shape[0], -1, *q.shape[1:])  # [Hkv, G, r, D]
        own = torch.einsum("hgrd,hrid->hgri", grouped, own_k)
        scores = torch.cat([_scores(q, past_k), own], dim=-1) * scaling
        weights = _weights(scores, seen, softcap, sinks).to(own_v.dtype)
        from_past, from_own = weights.split([len(past), step + 1], dim=-1)
        mixed = (from_past.flatten(1, 2) @ past_v).view(*grouped.shape[:3], -1)
        return (mixed + torch.einsum("hgri,hrid->hgrd", from_own, own_v)).flatten(0, 1)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [H, R, D], k [Hkv, T, D] -> [Hkv, H / Hkv, R, T]; query heads share K/V heads in order."""
    grouped = q.reshape(k.shape[0], -1, k.shape[-1])
    return (grouped @ k.transpose(1, 2)).view(k.shape[0], -1, q.shape[1], k.shape[1])


def _within(distance: Tensor, window: int | None) -> Tensor:
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _weights(scores: Tensor, seen: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """`sinks`, [H]: a score that each head gives to nothing at all, which takes its share of the softmax."""
    scores = scores.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.float().view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
    """transformers' attention interface; the pass in progress comes with the forward's keyword `rollout`."""
    scaling = kwargs.get("scaling")
    out = kwargs["rollout"].attend(
        module.layer_idx,
        query,
        key,
        value,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
        kwargs.get("sliding_window"),
        kwargs.get("softcap"),
        kwargs.get("s_aux"),
    )
    return out.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def rollout_attention(stack: DecoderStack) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
    before = stack.config._attn_implementation
    stack.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        stack.config._attn_implementation = before

"""The draft's head over a part of the vocabulary: which tokens, how many, and what they cost.

The idea is FR-Spec's (arXiv 2502.14856): text is made of few of a vocabulary's tokens, and the head is
read whole for each drafted one. Output stays exact, since verification uses the full head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdfp_vllm.engine.draft.cpu_linear import engine_linear
from sdfp_vllm.plan.rounding import copy_bytes
from sdfp_vllm.plan.view import Precision
from sdfp_vllm.planner.rounded import rounded_copy_of, rounded_product
from sdfp_vllm.planner.stack import DecoderStack

FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_MULTIPLE = 64  # rows that matrix kernels like to come in
_MIN_REPEATS, _MAX_REPEATS, _SECONDS = 5, 40, 3.0


def rank_tokens(counts: Sequence[Tensor], always: Iterable[int] = ()) -> Tensor:
    """All token ids, the most frequent first: int64 [V].

    A token's frequency is the mean of its frequencies in each text counted, so that a short text that
    the target wrote weighs as much as a long one that it was shown. Unseen tokens, and ties, go by id: in
    a byte-pair vocabulary ids ascend in the order of merging, the frequent pairs first. That is all the
    smoothing there is.

    Args:
        counts: Occurrences in each text, int64 [V].
        always: Ids that come first whatever their frequency: end of text, and what a chat is framed with.
    """
    frequency = sum(c / c.sum().clamp(min=1) for c in (c.double() for c in counts))
    assert isinstance(frequency, Tensor)
    first = torch.tensor(sorted({i for i in always if 0 <= i < len(frequency)}), dtype=torch.int64)
    frequency[first] = torch.inf
    return frequency.argsort(descending=True, stable=True)


def head_sizes(vocab_size: int) -> list[int]:
    """Numbers of tokens worth trying: fractions of the vocabulary, whole multiples of what kernels like."""
    sizes = {-(-int(vocab_size * f) // _MULTIPLE) * _MULTIPLE for f in FRACTIONS}
    return sorted(n for n in sizes if 0 < n < vocab_size)


def head_bytes(tokens: int, hidden: int, precision: Precision, dtype: torch.dtype) -> int:
    """Bytes of the rows of `tokens` ids, which a restricted head holds beside the target's at any precision."""
    if precision == "full":
        return tokens * hidden * dtype.itemsize
    return copy_bytes(tokens, hidden, precision, dtype)


class RolledHead(nn.Module):
    """The head as a draft has it in a rollout: [R, hidden] -> [R, M] logits of `tokens` (None: of all).

    Scale and soft cap of logits are left out, as in `DecoderStack.head` (`DecoderStack.scaled` has them).

    Args:
        tokens: int64 [M], ascending.
    """

    @torch.no_grad()
    def __init__(self, stack: DecoderStack, tokens: Tensor | None, precision: Precision = "full"):
        super().__init__()
        head: nn.Linear = stack.head  # type: ignore[assignment]
        self.tokens = None if tokens is None else tokens.to(head.weight.device)
        rows = slice(None) if self.tokens is None else self.tokens
        self.weight: Any = head.weight.detach()[rows]
        self.bias: Any = None if head.bias is None else head.bias.detach()[rows]
        self._product: Any = None
        if precision != "full":
            self._product = rounded_copy_of(self.weight, self.bias, precision)

    def forward(self, hidden: Tensor) -> Tensor:
        if self._product is not None:
            return self._product(hidden)
        return nn.functional.linear(hidden, self.weight, self.bias)


@torch.no_grad()
def measure_heads(
    stack: DecoderStack, ranking: Tensor, heads: Sequence[tuple[int, Precision]]
) -> dict[tuple[int, Precision], float]:
    """Milliseconds of the head over the `n` first of `ranking`, at a precision, for each of `heads`.

    One row, as the engine computes it: norm, product, logits of full width, argmax. Best of many; all
    heads take turns, so that each finds its weights in memory and not in the processor's cache.
    """
    norm, vocab = stack.norm, len(ranking)
    like = next(stack.head.parameters())
    x = torch.randn(1, like.shape[1], dtype=like.dtype, device=like.device)
    parts: dict[tuple[int, Precision], Callable[[], Tensor]] = {}
    for n, precision in heads:
        tokens = ranking[:n].sort().values.to(like.device)
        weight = like.detach() if n == vocab else like.detach()[tokens]
        product = engine_linear(weight) if precision == "full" else rounded_product(weight, precision)
        parts[n, precision] = _restricted(product, None if n == vocab else tokens, vocab, norm, x)
    best = dict.fromkeys(parts, float("inf"))
    began = time.perf_counter()
    for repeat in range(_MAX_REPEATS):
        if repeat >= _MIN_REPEATS and time.perf_counter() - began > _SECONDS:
            break
        for key, part in parts.items():
            best[key] = min(best[key], _timed(part, like.is_cuda))
    return {key: took * 1e3 for key, took in best.items()}


def _restricted(linear, tokens: Tensor | None, vocab: int, norm: nn.Module, x: Tensor):
    def part() -> Tensor:
        logits = linear(norm(x))
        if tokens is None:
            return logits.argmax(-1)
        full = logits.new_full((1, vocab), -torch.inf)
        return full.index_copy_(1, tokens, logits).argmax(-1)

    return part


def _timed(part, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    part()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began

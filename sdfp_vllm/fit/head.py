"""The draft's head over a part of the vocabulary: which tokens, how many, and what they cost.

The idea is FR-Spec's (arXiv 2502.14856): text is made of few of a vocabulary's tokens, and the head is
read whole for each drafted one. Output stays exact, since verification uses the full head.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sdfp_vllm.fit.stack import DecoderStack
from sdfp_vllm.integration.cpu_linear import engine_linear

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


@torch.no_grad()
def restricted_linear(stack: DecoderStack, tokens: Tensor) -> nn.Linear:
    """The head over `tokens` alone, int64 [M]: [R, hidden] -> [R, M], a copy of its rows.

    Scale and soft cap of logits are left out, as in `DecoderStack.head`: they do not change the argmax.
    """
    head: nn.Linear = stack.head  # type: ignore[assignment]
    tokens = tokens.to(head.weight.device)
    made = nn.Linear(head.in_features, len(tokens), bias=head.bias is not None, device="meta")
    made.weight = nn.Parameter(head.weight[tokens], requires_grad=False)
    if head.bias is not None:
        made.bias = nn.Parameter(head.bias[tokens], requires_grad=False)
    return made


@torch.no_grad()
def measure_heads(stack: DecoderStack, ranking: Tensor, sizes: Sequence[int]) -> dict[int, float]:
    """Time of the head over the `n` first of `ranking`, for each n of `sizes`, as a share of the full head's.

    One row, as the engine computes it: norm, product, logits of full width, argmax. Best of many; all
    sizes take turns, so that each finds its weights in memory and not in the processor's cache.
    """
    norm, vocab = stack.norm, len(ranking)
    like = next(stack.head.parameters())
    x = torch.randn(1, like.shape[1], dtype=like.dtype, device=like.device)
    full = engine_linear(stack.head)  # type: ignore[arg-type]
    parts = {vocab: lambda: full(norm(x)).argmax(-1)}
    for n in sizes:
        tokens = ranking[:n].sort().values.to(like.device)
        parts[n] = _restricted(engine_linear(restricted_linear(stack, tokens)), tokens, vocab, norm, x)
    best = dict.fromkeys(parts, float("inf"))
    began = time.perf_counter()
    for repeat in range(_MAX_REPEATS):
        if repeat >= _MIN_REPEATS and time.perf_counter() - began > _SECONDS:
            break
        for n, part in parts.items():
            best[n] = min(best[n], _timed(part, like.is_cuda))
    return {n: best[n] / best[vocab] for n in sizes}


def _restricted(linear, tokens: Tensor, vocab: int, norm: nn.Module, x: Tensor):
    def part() -> Tensor:
        logits = linear(norm(x))
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

"""The two halves of a batch that is guided: calls for one of them, and their outputs' difference.

A guided prediction is u + s (c - u) with c asked for with the condition, u without, and s the scale. Where d = u - c hardly changes from step to
step, u need not be computed: it is c + d, and an error of d counts s - 1 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_with_path

from sdfp_vllm.dipgo.families import layout_of
from sdfp_vllm.dipgo.layout import Unit
from sdfp_vllm.dipgo.streams import batch_of

_ALIKE = 1e-2  # of the largest: half precision, and products of another size
_SHARED = "rotary"  # in the names of arguments that are for all rows


def conditioned(unit: Unit, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call for the half with the condition: of every tensor that has a row for each of the batch."""
    rows = len(batch_of(args, kwargs))

    def half(path: tuple, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != rows or _SHARED in str(path):
            return value
        return _halves(unit, value)[0]

    return tree_map_with_path(half, (args, kwargs))  # type: ignore[no-any-return]


def difference(unit: Unit, output: Any) -> Any:
    """What the other half's output is more than that of the half with the condition."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        kept, other = _halves(unit, value)
        return other - kept

    return tree_map(of, output)


def both(unit: Unit, output: Any, more: Any) -> Any:
    """A whole batch's output, from that of the half with the condition and the difference."""

    def of(kept: Any, value: Any) -> Any:
        if not isinstance(kept, Tensor):
            return kept
        halves = [kept, kept + value]
        return torch.cat(halves if unit.guidance == "first" else halves[::-1])

    return tree_map(of, output, more)


def only_conditioned(unit: Unit, output: Any) -> Any:
    """Of a whole batch's output the half with the condition."""
    return tree_map(lambda value: _halves(unit, value)[0] if isinstance(value, Tensor) else value, output)


def is_guided(denoiser: nn.Module, calls: Sequence[tuple[tuple, dict[str, Any]]]) -> bool:
    """Whether a step's calls for one image ask with and without the condition in one batch, whose halves do not depend on each other.

    One half is computed alone, and must be what it is in the whole.
    """
    unit, (args, kwargs) = layout_of(denoiser, "guidance").units[0], calls[0]
    if len(calls) > 1 or len(batch_of(args, kwargs)) != 2 or not is_pair(args, kwargs):
        return False
    try:
        with torch.no_grad():
            whole = tree_leaves(only_conditioned(unit, denoiser(*_fresh(args), **_fresh(kwargs))))
            some, named = conditioned(unit, args, kwargs)
            alone = tree_leaves(denoiser(*some, **named))
        return all(map(_alike, whole, alone))
    except Exception:
        return (
            False  # a denoiser that nobody listed may raise anything where it cannot do with half of its rows
        )


@torch.compiler.disable
def is_pair(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the rows of a call are the same noisy batch twice, as guidance in one batch has them."""
    batch = batch_of(args, kwargs)
    return len(batch) % 2 == 0 and torch.equal(*batch.chunk(2))


def _fresh(arguments: Any) -> Any:
    return tree_map(lambda leaf: leaf, arguments)  # some denoisers take arguments out of their containers


def _alike(a: Any, b: Any) -> bool:
    return not isinstance(a, Tensor) or torch.allclose(a, b, rtol=_ALIKE, atol=_ALIKE * float(a.abs().max()))


def _halves(unit: Unit, value: Tensor) -> tuple[Tensor, Tensor]:
    """The half with the condition, and the other."""
    first, second = value.chunk(2)
    return (first, second) if unit.guidance == "first" else (second, first)

"""What a unit gave in earlier calls, and what is taken in its place when it does not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sdfp_vllm.dipgo.forecast import KINDS, slopes


class History:
    """The last values a unit computed: one for reuse as it was (order 0), two to go on in a straight line (order 1), three for order 2.

    Steps are those of the plan. With values a at step i and b at step j > i, order 1
    gives b + (t - j) / (j - i) * (b - a) at step t; with one value only, that value. `forecast.py` has all kinds.

    What is kept and what is given out are copies: blocks, adapters and FreeU write into what other blocks put out,
    and compiled graphs into what they put out before. A tensor that a value has twice is one tensor in its copy too.
    """

    def __init__(self, order: int):
        self._keep, self._kind = order + 1, str(order)
        self._computed: list[tuple[int, list[Any]]] = []
        self._spec: TreeSpec | None = None
        self._places: list[int] = []

    def store(self, step: int, value: Any) -> None:
        leaves, self._spec = tree_flatten(value)
        different = list({id(leaf): leaf for leaf in leaves}.values())
        index = {id(leaf): i for i, leaf in enumerate(different)}
        self._places = [index[id(leaf)] for leaf in leaves]
        self._computed = [*self._computed, (step, _copies(different))][-self._keep :]

    def recall(self, step: int, kind: str | None = None) -> Any:
        """The forecast for `step`, of this kind (`forecast.KINDS`); by default the one of the history's order."""
        assert self._spec is not None, "the first call of a denoiser runs every unit"
        steps, held = zip(*reversed(self._computed), strict=True)
        factors = slopes(kind or self._kind, step, steps)
        values = [_ahead(leaves, factors) for leaves in zip(*held, strict=True)]
        return tree_unflatten([values[i] for i in self._places], self._spec)

    def refit(self, lengths: Mapping[int, int]) -> None:
        """Cuts what is held, or pads it with zeros, to these lengths along its second dimension; by place in the value.

        For texts in a batch that are padded to the longest: what lies beyond a text's own end is masked wherever it is read.
        """
        for place, length in lengths.items():
            for _, leaves in self._computed:
                held = leaves[self._places[place]]
                if held.shape[1] != length:
                    kept = held[:, :length]
                    padding = kept.new_zeros(kept.shape[0], length - kept.shape[1], *kept.shape[2:])
                    leaves[self._places[place]] = torch.cat([kept, padding], dim=1)


def _ahead(leaves: Sequence[Any], factors: list[float]) -> Any:
    """The first of `leaves` (latest first), plus the differences of neighbours by `factors`; always a new tensor."""
    latest = leaves[0]
    if not isinstance(latest, Tensor):
        return latest  # a block may give None for a stream that nothing reads any more
    if not factors:
        return latest.clone()
    for factor, later, earlier in zip(factors, leaves, leaves[1:], strict=False):
        latest = latest + factor * (later - earlier)
    return latest


def _copies(values: list[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def recalled(
    runs: Sequence[bool], order: int, stages: Sequence[int] = (0,), kinds: Sequence[str] | None = None
) -> NDArray[np.bool_]:
    """Which earlier values a unit takes where it does not run: (steps, steps), True at [t, s] if step t takes that of s.

    Args:
        stages: The steps at which a denoiser takes over; what another one computed is not taken.
        kinds: How it is forecast in each step, in place of `order`.
    """
    taken = np.zeros((len(runs), len(runs)), dtype=bool)
    for t, run in enumerate(runs):
        if not run:
            began = max(s for s in stages if s <= t)
            values = (order if kinds is None else KINDS[kinds[t]]) + 1
            taken[t, [s for s in range(began, t) if runs[s]][-values:]] = True
    return taken

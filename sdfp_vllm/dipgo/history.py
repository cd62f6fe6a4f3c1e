"""What a unit gave in earlier calls, and what is taken in its place when it does not run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class History:
    """The last values a unit computed: one for reuse as it was (order 0), two to go on in a straight line (order 1).

    Steps are counted in denoiser calls. With values a at step i and b at step j > i, order 1
    gives b + (t - j) / (j - i) * (b - a) at step t; with one value only, that value.

    What is kept and what is given out are copies: blocks, adapters and FreeU write into what other blocks put out,
    and compiled graphs into what they put out before. A tensor that a value has twice is one tensor in its copy too.
    """

    def __init__(self, order: int):
        self._keep = order + 1
        self._computed: list[tuple[int, list[Any]]] = []
        self._spec: TreeSpec | None = None
        self._places: list[int] = []

    def store(self, step: int, value: Any) -> None:
        leaves, self._spec = tree_flatten(value)
        different = list({id(leaf): leaf for leaf in leaves}.values())
        index = {id(leaf): i for i, leaf in enumerate(different)}
        self._places = [index[id(leaf)] for leaf in leaves]
        self._computed = [*self._computed, (step, _copies(different))][-self._keep :]

    def recall(self, step: int) -> Any:
        assert self._spec is not None, "the first call of a generation runs every unit"
        last, values = self._computed[-1]
        if len(self._computed) == 2:
            before, older = self._computed[0]
            ahead = (step - last) / (last - before)
            values = [b + ahead * (b - a) for a, b in zip(older, values, strict=True)]
        else:
            values = _copies(values)
        return tree_unflatten([values[i] for i in self._places], self._spec)


def _copies(values: list[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def recalled(runs: list[bool], order: int) -> NDArray[np.bool_]:
    """Which earlier values a unit takes where it does not run: (calls, calls), True at [t, s] if call t takes that of s."""
    taken = np.zeros((len(runs), len(runs)), dtype=bool)
    for t, run in enumerate(runs):
        if not run:
            taken[t, [s for s in range(t) if runs[s]][-(order + 1) :]] = True
    return taken

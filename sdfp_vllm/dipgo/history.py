"""What a unit gave in earlier calls, and what is taken in its place when it does not run."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class History:
    """The last values a unit computed: one for reuse as it was (order 0), two to go on in a straight line (order 1).

    Steps are counted in denoiser calls. With values a at step i and b at step j > i, order 1
    gives b + (t - j) / (j - i) * (b - a) at step t; with one value only, that value.
    """

    def __init__(self, order: int):
        self._keep = order + 1
        self._computed: list[tuple[int, list[Any]]] = []
        self._spec: TreeSpec | None = None

    def clear(self) -> None:
        self._computed, self._spec = [], None

    def store(self, step: int, value: Any) -> None:
        leaves, self._spec = tree_flatten(value)
        self._computed = [*self._computed, (step, leaves)][-self._keep :]

    def recall(self, step: int) -> Any:
        assert self._spec is not None, "the first call of a generation runs every unit"
        last, leaves = self._computed[-1]
        if len(self._computed) == 2:
            before, older = self._computed[0]
            ahead = (step - last) / (last - before)
            leaves = [b + ahead * (b - a) for a, b in zip(older, leaves, strict=True)]
        return tree_unflatten(leaves, self._spec)

"""What the denoiser gave in every step of the full run, and what forecasts of it would err by.

Neither gradients nor units are needed for this, and it says more than a prediction that was made around the full run where many steps in a row
are left out: such errors are not small, and what becomes of them is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sdfp_vllm.dipgo.forecast import KINDS, coefficients
from sdfp_vllm.dipgo.sampling import Sampler

Norm = Literal["absolute", "squared"]

Errors = Callable[[int, str, tuple[int, ...]], float]
"""What a forecast errs by: in a step, of a kind, from the values of some steps, latest first. Those of a schedule are summed."""

_PER_ROW = 1024  # elements that stand for a row of an output


class Outputs:
    """Elements of the denoiser's outputs, drawn once: of every step the same ones, of all images and calls of a step.

    Filled by generations while `listening`.
    """

    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self._steps: list[list[Tensor]] = [[] for _ in range(sampler.calls)]
        self._drawn: dict[tuple[int, int], Tensor] = {}
        self._calls = 0
        self._values: Tensor | None = None
        self._known: dict[tuple[int, str, tuple[int, ...]], dict[Norm, float]] = {}

    @contextmanager
    def listening(self) -> Iterator[Outputs]:
        """While whole generations run in full."""
        handles = [d.register_forward_hook(self._note) for d in self._sampler.denoisers]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: object, args: tuple, output: object) -> None:
        step = self._calls // self._sampler.rhythm.branches % len(self._steps)
        self._calls += 1
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self._steps[step].append(self._some(leaf.detach()))

    def _some(self, leaf: Tensor) -> Tensor:
        elements = leaf.numel() // len(leaf)
        if elements > _PER_ROW:
            key = len(leaf), elements
            if key not in self._drawn:
                draw = torch.Generator().manual_seed(elements)
                self._drawn[key] = torch.randint(elements, (len(leaf), _PER_ROW), generator=draw)
            leaf = leaf.flatten(1).gather(1, self._drawn[key].to(leaf.device))
        return leaf.flatten().float().cpu()

    def errors(self, norm: Norm) -> Errors:
        """What forecasts of the outputs err by, as a mean over elements."""
        return lambda step, kind, computed: self._error(step, kind, computed[: KINDS[kind] + 1])[norm]

    def _error(self, step: int, kind: str, computed: tuple[int, ...]) -> dict[Norm, float]:
        key = step, kind, computed
        if key not in self._known:
            if self._values is None:
                self._values = torch.stack([torch.cat(each) for each in self._steps])
            error = -self._values[step]
            for c, s in zip(coefficients(kind, step, computed), computed, strict=False):
                error.add_(self._values[s], alpha=c)
            self._known[key] = {
                "absolute": float(error.abs().mean()),
                "squared": float(error.square().mean()),
            }
        return self._known[key]

"""Triton where it is installed; names that decorate nothing where it is not."""

from __future__ import annotations

import os
from typing import Any

import torch

__all__ = ["HAS_TRITON", "INTERPRETED", "runs_triton", "tl", "triton"]


class _Absent:
    """Stands in for `triton` and `tl` at import: every attribute returns its first argument."""

    def __getattr__(self, name: str) -> Any:
        return lambda value=None, *args, **kwargs: value


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = _Absent()
    HAS_TRITON = False

# Triton reads the variable when a kernel is decorated, so what stood there at import counts.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether a kernel of this package can be launched on `tensor`."""
    return HAS_TRITON and (tensor.is_cuda or INTERPRETED)

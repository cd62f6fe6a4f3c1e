"""Tolerances against a float64 reference, and inputs that catch a kernel reading or writing astray."""

from __future__ import annotations

import torch

# dtype -> (atol, rtol): a result is computed in float32 and rounded once, so half a unit in the last
# place of the dtype, and in float32 a few of them from the order of a sum. Triton's interpreter cuts
# bfloat16 off where a GPU rounds it: a whole unit.
TOLERANCE = {
    torch.float32: (4e-5, 4e-5),
    torch.bfloat16: (1e-6, 2**-7),
    torch.float16: (1e-6, 2**-11),
}
POISON = 12345.0


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Asserts that `got` is the float64 `want` within its dtype's tolerance."""
    atol, rtol = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=rtol * 1.05)


def strided(rows: int, hidden: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows [rows, hidden] inside a wider, poisoned buffer; returns the view and the buffer."""
    g = torch.Generator().manual_seed(seed)
    buffer = torch.full((rows, hidden + 24), POISON, dtype=dtype)
    view = buffer[:, 8 : 8 + hidden]
    view.copy_(torch.randn(rows, hidden, generator=g))
    return view, buffer


def unharmed(buffer: torch.Tensor, hidden: int) -> bool:
    """Whether nothing around the view of `strided` was written."""
    edges = torch.cat([buffer[:, :8], buffer[:, 8 + hidden :]], dim=1)
    return bool((edges == POISON).all())


def random_like(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)

"""The digits: 1,797 grey images of 8 x 8 pixels in ten classes, bundled with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = 10
PLACES = 4  # of digits in a picture
SIDE = 8


def digits() -> tuple[Tensor, Tensor]:
    """Returns images (1797, 1, 8, 8), float32 in [-1, 1], and labels (1797,), int64 in 0..9."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.int64)


def pictures(images: Tensor) -> Tensor:
    """Four digits in two rows of two: (n, 4, 1, 8, 8) as (n, 1, 16, 16)."""
    grid = images.reshape(-1, 2, 2, SIDE, SIDE).transpose(2, 3)
    return grid.reshape(-1, 1, 2 * SIDE, 2 * SIDE)


def cut(images: Tensor) -> Tensor:
    """The inverse for pictures of any number of digits, one among them: every digit as a picture, row by row."""
    return images.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).reshape(-1, 1, SIDE, SIDE)

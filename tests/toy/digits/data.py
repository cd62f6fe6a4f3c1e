"""The digits: 1,797 grey images of 8 x 8 pixels in ten classes, bundled with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = 10


def digits() -> tuple[Tensor, Tensor]:
    """Returns images (1797, 1, 8, 8), float32 in [-1, 1], and labels (1797,), int64 in 0..9."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.int64)

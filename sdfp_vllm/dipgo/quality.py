"""How close images are to those of the full run."""

from __future__ import annotations

import torch
from pytorch_msssim import ssim as _ssim
from torch import Tensor

_RANGE = 2.0  # images are in [-1, 1]
_BEST_PSNR = 100.0
_WINDOW = 11


def psnr(images: Tensor, full: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (images,); at most 100, which identical images get."""
    error = (images.clamp(-1, 1) - full.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(_RANGE**2 / error.clamp(min=_RANGE**2 * 10 ** (-_BEST_PSNR / 10)))


def ssim(images: Tensor, full: Tensor, clamp: bool = True) -> Tensor:
    """Structural similarity of each image, (images,); Gaussian window of 11 pixels, or 7 on images smaller than that.

    Of a video (channels, frames, height, width) it is the mean over its frames.

    Args:
        clamp: Cut values to [-1, 1] first, as saving does. A loss leaves them, for the gradient.
    """
    if clamp:
        images, full = images.clamp(-1, 1), full.clamp(-1, 1)
    if images.dim() == 5:
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (images, full)]
        return ssim(flat[0], flat[1], clamp).reshape(len(images), -1).mean(1)
    window = _WINDOW if min(images.shape[-2:]) >= _WINDOW else 7
    # Shifted to [0, 2]: the formula's luminance term takes means as non-negative.
    value = _ssim(images + 1, full + 1, data_range=_RANGE, size_average=False, win_size=window)
    return (
        value.clamp(max=1.0) if clamp else value
    )  # of images that are nearly alike, sums round to more than 1

"""Likeness stays within its bounds, whatever sums round to."""

from __future__ import annotations

import torch

from sdfp_vllm.dipgo.quality import ssim


def test_no_image_is_more_than_alike():
    """A search of a tiny pipeline once ended in an SSIM of 1.0000119, which no plan takes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(400, 3, 16, 16, generator=generator) * 2 - 1
    near = images + 1e-6 * torch.randn(images.shape, generator=generator)
    assert (ssim(near, images, clamp=False) > 1).any()
    assert (ssim(near, images) <= 1).all() and (ssim(near, images) > 0.999).all()

"""What a launcher asks of its tensors: a wrong stride in a kernel is silent corruption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], like: Tensor
) -> None:
    """Raises ValueError unless `tensor` has the shape (None: any size), one of the dtypes and `like`'s device.

    The last dimension must be contiguous; other strides are free.
    """
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        want = [("any" if n is None else n) for n in shape]
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {want}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected one of {list(dtypes)}")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, has strides {tensor.stride()}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {like.device}")

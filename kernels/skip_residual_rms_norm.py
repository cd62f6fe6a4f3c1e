"""Entry into a kept layer after a run of skipped ones, in one pass over the row.

    h        = residual + branch                      (the last kept layer's pending branch output)
    h        = bridge(h)                              (none, bias, affine or low rank: `sdfp_vllm/bridge.py`)
    residual = h                                      (in place, rounded to its dtype)
    out      = h / sqrt(mean(h^2) + eps) * (w + o)    (o = 0: Llama; o = 1: Gemma)

RMSNorm: Zhang and Sennrich, arXiv 1910.07467, eq. 4. The sum, the bridge and the norm are computed
in float32 from the unrounded h. Without a bridge this is vLLM's `fused_add_rms_norm`, which the
runtime then uses; with one, vLLM has no op.
"""

import torch
from torch import Tensor

from sdfp_vllm.bridge import Bridge
from sdfp_vllm.kernels.checks import FLOATS, check
from sdfp_vllm.kernels.triton_support import runs_triton, tl, triton

MAX_HIDDEN = 32768
_TILE = 16384  # elements of `down` or `up` held at once: 64 registers a thread at 256 threads


@triton.jit
def _kernel(
    branch_ptr,
    branch_stride,
    residual_ptr,
    residual_stride,
    out_ptr,
    out_stride,
    weight_ptr,
    shift_ptr,
    scale_ptr,
    mean_ptr,
    down_ptr,
    up_ptr,
    hidden,
    eps,
    weight_offset,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < hidden
    own = residual_ptr + row * residual_stride + col
    # Columns past the row are zero in everything loaded, and stay zero.
    h = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    h += tl.load(branch_ptr + row * branch_stride + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        h *= tl.load(scale_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if RANK > 0:
        centred = h - tl.load(mean_ptr + col, mask=inside, other=0.0).to(tl.float32)
        for first in range(0, RANK, RANK_TILE):
            r = first + tl.arange(0, RANK_TILE)
            at = r[:, None] * hidden + col[None, :]
            mask = (r[:, None] < RANK) & inside[None, :]
            down = tl.load(down_ptr + at, mask=mask, other=0.0).to(tl.float32)
            narrow = tl.sum(down * centred[None, :], axis=1)
            up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
            h += tl.sum(up * narrow[:, None], axis=0)
    if HAS_SHIFT:
        h += tl.load(shift_ptr + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(own, h.to(residual_ptr.dtype.element_ty), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32) + weight_offset
    tl.store(out_ptr + row * out_stride + col, (h * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def skip_residual_rms_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    bridge: Bridge | None = None,
    *,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Adds, bridges and normalises; writes the new residual stream into `residual`.

    Args:
        branch: [T, H] float32, bfloat16 or float16; the output of the last kept layer's branch.
        residual: [T, H], the same dtype; overwritten.
        weight: [H], the next kept layer's input norm.
        eps: Added to the mean square.
        bridge: Its tensors contiguous and on the same device, any float dtype.
        weight_offset: 1.0 where the norm's weight is stored as w - 1 (Gemma).
        out: [T, H] in `branch`'s dtype, overwritten; None allocates.

    Returns:
        The normed rows [T, H].

    Raises:
        ValueError: On shapes, strides, dtypes or devices that do not fit together.
    """
    rows, hidden = branch.shape
    check("branch", branch, (rows, hidden), FLOATS, branch)
    check("residual", residual, (rows, hidden), (branch.dtype,), branch)
    check("weight", weight, (hidden,), FLOATS, branch)
    if bridge is not None:
        _check_bridge(bridge, hidden, branch)
    if out is None:
        out = torch.empty_like(branch, memory_format=torch.contiguous_format)
    check("out", out, (rows, hidden), (branch.dtype,), branch)
    if not runs_triton(branch):
        return reference(branch, residual, weight, eps, bridge, weight_offset=weight_offset, out=out)
    if hidden > MAX_HIDDEN:
        raise ValueError(f"rows of {hidden} elements, the kernel holds at most {MAX_HIDDEN}")
    t = {} if bridge is None else bridge.tensors()
    _launch(branch, residual, weight, eps, weight_offset, out, *map(t.get, _BRIDGE_TENSORS))
    return out


_BRIDGE_TENSORS = ("shift", "scale", "mean", "down", "up")


# An op of its own, so that torch.compile sees one call with a declared write instead of tracing into it.
@torch.library.custom_op("sdfp_vllm::skip_residual_rms_norm", mutates_args=("residual", "out"))
def _launch(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    out: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> None:
    rows, hidden = branch.shape
    if not rows:
        return
    block = triton.next_power_of_2(hidden)
    rank = 0 if down is None else down.shape[0]
    tile = min(max(1, _TILE // block), triton.next_power_of_2(max(1, rank)))
    _kernel[(rows,)](
        branch,
        branch.stride(0),
        residual,
        residual.stride(0),
        out,
        out.stride(0),
        weight,
        shift,
        scale,
        mean,
        down,
        up,
        hidden,
        eps,
        weight_offset,
        HAS_SHIFT=shift is not None,
        HAS_SCALE=scale is not None,
        RANK=rank,
        RANK_TILE=tile,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )


@_launch.register_fake
def _(branch, residual, weight, eps, weight_offset, out, shift, scale, mean, down, up):
    return None


def reference(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    bridge: Bridge | None = None,
    *,
    weight_offset: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """The same in torch; also takes float64."""
    wide = torch.promote_types(branch.dtype, torch.float32)
    h = residual.to(wide) + branch.to(wide)
    if bridge is not None:
        h = bridge.apply(h)
    residual.copy_(h)
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + weight_offset)
    if out is None:
        return normed.to(branch.dtype)
    return out.copy_(normed)


def _check_bridge(bridge: Bridge, hidden: int, like: Tensor) -> None:
    for name, tensor in bridge.tensors().items():
        check(
            f"bridge.{name}",
            tensor,
            (bridge.rank, hidden) if name in ("down", "up") else (hidden,),
            FLOATS,
            like,
        )
        if not tensor.is_contiguous():
            raise ValueError(f"bridge.{name} must be contiguous, has strides {tensor.stride()}")

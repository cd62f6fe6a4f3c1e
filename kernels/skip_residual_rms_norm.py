"""Entry into a kept layer after a run of skipped ones, in one pass over the row.

    h        = residual + branch                      (the last kept layer's pending branch output)
    h        = bridge(h)                              (none, bias, affine or low rank: `sdfp_vllm/plan/bridge.py`)
    residual = h                                      (in place, rounded to its dtype)
    out      = h / sqrt(mean(h^2) + eps) * (w + o)    (o = 0: Llama; o = 1: Gemma)

RMSNorm: Zhang and Sennrich, arXiv 1910.07467, eq. 4. The sum, the bridge and the norm are computed
in float32 from the unrounded h. Without a bridge this is vLLM's `fused_add_rms_norm`, which the
runtime then uses; with one, vLLM has no op. The same kernel gives rows in int8 or fp8 for
`skip_residual_rms_norm_rounded.py`.
"""

import torch
from torch import Tensor

from sdfp_vllm.kernels.checks import FLOATS, check
from sdfp_vllm.kernels.triton_support import runs_triton, tl, triton
from sdfp_vllm.plan.bridge import Bridge

MAX_HIDDEN = 32768
_TILE = 16384  # elements of `down` or `up` held at once: 64 registers a thread at 256 threads


@triton.jit
def _e4m3(x):
    """The byte of the float8_e4m3fn nearest to float32 x, |x| < 464, ties to even.

    In integers: Triton's interpreter casts to fp8 wrongly (ties, carries, subnormals), and no cast is there
    before sm_89.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # From 2^-6 on, 3 of float32's 23 mantissa bits stay, and the exponent's bias goes from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below, multiples of 2^-9: the last place of a float32 at 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _kernel(
    branch_ptr,
    branch_stride,
    residual_ptr,
    residual_stride,
    out_ptr,
    out_stride,
    row_scale_ptr,
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
    ROUND: tl.constexpr,  # 0: no, 1: int8, 2: the bytes of float8_e4m3fn
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
    out = h * scale * weight
    if ROUND > 0:
        largest = tl.max(tl.abs(out), axis=0)
        if ROUND == 1:
            row_scale = tl.div_rn(largest, 127.0)
            # The sum's last place is 1. The bound is the smallest normal number: a row of zeros divides by it.
            out = (tl.div_rn(out, tl.maximum(row_scale, 1.1754943508222875e-38)) + 12582912.0) - 12582912.0
        else:
            row_scale = tl.maximum(tl.div_rn(largest, 448.0), 1.0 / (448.0 * 512.0))
            out = _e4m3(tl.div_rn(out, row_scale))
        tl.store(row_scale_ptr + row, row_scale)
    tl.store(out_ptr + row * out_stride + col, out.to(out_ptr.dtype.element_ty), mask=inside)


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
    check_inputs(branch, residual, weight, bridge)
    if out is None:
        out = torch.empty_like(branch, memory_format=torch.contiguous_format)
    check("out", out, branch.shape, (branch.dtype,), branch)
    if not runs_kernel(branch):
        return reference(branch, residual, weight, eps, bridge, weight_offset=weight_offset, out=out)
    _launch(branch, residual, weight, eps, weight_offset, out, *bridge_arguments(bridge))
    return out


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
    launch(branch, residual, weight, eps, weight_offset, out, None, 0, shift, scale, mean, down, up)


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
    normed = wide_reference(branch, residual, weight, eps, bridge, weight_offset)
    if out is None:
        return normed.to(branch.dtype)
    return out.copy_(normed)


# ---------------------------------------------------------------- shared with the rounded op
def check_inputs(branch: Tensor, residual: Tensor, weight: Tensor, bridge: Bridge | None) -> None:
    """Raises ValueError on shapes, strides, dtypes or devices that do not fit together."""
    check("branch", branch, (None, None), FLOATS, branch)
    check("residual", residual, branch.shape, (branch.dtype,), branch)
    hidden = branch.shape[1]
    check("weight", weight, (hidden,), FLOATS, branch)
    if bridge is None:
        return
    for name, tensor in bridge.tensors().items():
        shape = (bridge.rank, hidden) if name in ("down", "up") else (hidden,)
        check(f"bridge.{name}", tensor, shape, FLOATS, branch)
        if not tensor.is_contiguous():
            raise ValueError(f"bridge.{name} must be contiguous, has strides {tensor.stride()}")


def runs_kernel(branch: Tensor) -> bool:
    """Whether the kernel is to be launched on these rows; ValueError where they are too long for it."""
    if runs_triton(branch) and branch.shape[1] > MAX_HIDDEN:
        raise ValueError(f"rows of {branch.shape[1]} elements, the kernel holds at most {MAX_HIDDEN}")
    return runs_triton(branch)


def bridge_arguments(bridge: Bridge | None) -> tuple[Tensor | None, ...]:
    """shift, scale, mean, down and up, None where the bridge has none."""
    if bridge is None:
        return (None,) * 5
    return bridge.shift, bridge.scale, bridge.mean, bridge.down, bridge.up


def launch(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    out: Tensor,
    row_scales: Tensor | None,
    rounding: int,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> None:
    """Launches the kernel; `rounding` is its ROUND, `row_scales` [T, 1] contiguous where that is not 0."""
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
        row_scales,
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
        ROUND=rounding,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )


def wide_reference(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float, bridge: Bridge | None, weight_offset: float
) -> Tensor:
    """Writes the residual; the normed rows in float32 (float64 for float64)."""
    wide = torch.promote_types(branch.dtype, torch.float32)
    h = residual.to(wide) + branch.to(wide)
    if bridge is not None:
        h = bridge.apply(h)
    residual.copy_(h)
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + weight_offset)

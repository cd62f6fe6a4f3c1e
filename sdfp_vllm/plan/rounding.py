"""What a weight becomes in lower precision, and the product with it: the arithmetic, in torch alone.

A weight [N, K] (N outputs, K inputs) is rounded once; how far each precision goes:

    int8   codes in [-127, 127], one float32 scale per output; activations likewise per token
    fp8    float8 e4m3 codes, one float32 scale per output; activations likewise per token
    int4   codes in [-8, 7], one scale per group of 128, 64 or 32 inputs, in the weight's dtype;
           activations as they are
    mxfp4  e2m1 codes, one power of two (e8m0) per 32 inputs; activations likewise
           (OCP Microscaling Formats v1.0, section 6.3)

The details are those of vLLM's kernels, which `engine/draft/rounded_linear.py` runs: int8 as
`onednn_scaled_int8_quant` rounds, fp8 as `Fp8PtpcOnlineLinearMethod`, int4 as GPTQ's `uint4b8`, mxfp4
as `mxfp4_quantize`. Four-bit codes lie two to a byte, the lower input in the lower four bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.view import ROUNDED, Precision

_CHUNK = 1 << 20  # weights worked on at once: the widest intermediate is a few times 8 MB
_GROUPS = (128, 64, 32)  # group sizes that vLLM's int4 kernels share
_MX_BLOCK = 32
_INT8_MAX = 127.0
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_FP8_MIN_SCALE = 1.0 / (_FP8_MAX * 512)  # vLLM's floor: codes of smaller rows would be subnormal
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the values of codes 0 to 7; code + 8 is the negative
# int4: the scale is the best of these shares of max|w| / 7. A smaller one cuts the group's largest weight
# short and lies finer on the others; 7/8 fits a largest weight that is negative, at code -8.
_INT4_SHARES = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Rounded:
    """A weight [N, K] in lower precision.

    Args:
        precision: One of `ROUNDED`.
        codes: int8 [N, K]; float8_e4m3fn [N, K]; int4 (as code + 8) and mxfp4: uint8 [N, K / 2].
        scale: int8 and fp8: float32 [N, 1]; int4: [N, K / group] in the weight's dtype; mxfp4: uint8
            [N, K / 32], the exponent plus 127.
        group: Inputs that share a scale (K for int8 and fp8).
    """

    precision: Precision
    codes: Tensor
    scale: Tensor
    group: int


def group_size(k: int) -> int | None:
    """Returns how many of `k` inputs share an int4 scale; None: `k` cannot be rounded to int4."""
    return next((g for g in _GROUPS if k % g == 0), None)


def unroundable(precision: Precision, k: int) -> str | None:
    """Says why a weight with `k` inputs has no such rounding; None: it has one."""
    if precision not in ROUNDED:
        return f"{precision!r} is not one of {', '.join(ROUNDED)}"
    if _group(precision, k) is None:
        return f"{k} inputs cannot be split into blocks of {_MX_BLOCK}"
    return None


def round_weight(weight: Tensor, precision: Precision) -> Rounded:
    """Rounds `weight` [N, K], any float dtype, row chunk by row chunk; `weight` is left as it is.

    Raises:
        SdfpError: Where K does not divide into the precision's groups.
    """
    k = weight.shape[1]
    if why := unroundable(precision, k):
        raise SdfpError(f"--precision {precision}", why, "Choose int8 or fp8, which take any shape.")
    group = _group(precision, k)
    assert group is not None
    whole: list[Tensor] = []
    for rows in _chunks(weight):
        parts = _round(weight[rows], precision, group)
        whole = whole or [part.new_empty(len(weight), part.shape[1]) for part in parts]
        for tensor, part in zip(whole, parts, strict=True):
            tensor[rows] = part
    return Rounded(precision, whole[0], whole[1], group)


def dequantised(rounded: Rounded, dtype: torch.dtype) -> Tensor:
    """Returns the weight [N, K] that `rounded` stands for, in `dtype`, multiplied in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    n = len(rounded.codes)
    k = rounded.scale.shape[1] * rounded.group
    out = torch.empty(n, k, dtype=dtype, device=rounded.codes.device)
    for rows in _chunks(out):
        codes = _values(rounded.precision, rounded.codes[rows])
        out[rows] = _scaled(codes.to(wide), _multiplier(rounded.precision, rounded.scale[rows]))
    return out


def reference_linear(rounded: Rounded, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x W^T + bias as the kernels compute it, with W and where they do so x rounded.

    Args:
        rounded: The weight [N, K].
        x: [..., K], float32, bfloat16 or float16.
        bias: [N], any float dtype.

    Returns:
        [..., N] in `x`'s dtype. Sums are float32, those of int8 products exact.
    """
    inputs, input_scale = _round_inputs(rounded.precision, x)
    sums = []
    for rows in _chunks(rounded.codes):
        codes = _values(rounded.precision, rounded.codes[rows])
        multiplier = _multiplier(rounded.precision, rounded.scale[rows])
        if rounded.precision == "int8":  # float64 holds the int32 sums exactly
            acc = (inputs.double() @ codes.double().t()).float() * multiplier.t()
        elif rounded.precision == "fp8":
            acc = (inputs @ codes.t()) * multiplier.t()
        else:
            acc = inputs @ _scaled(codes, multiplier).t()
        sums.append(acc)
    out = torch.cat(sums, -1)
    if input_scale is not None:
        out = out * input_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def copy_bytes(n: int, k: int, precision: Precision, dtype: torch.dtype = torch.bfloat16) -> int:
    """Returns the bytes of a copy of a weight [n, k] of `dtype`, codes and scales.

    "full" shares the weight and takes none.
    """
    if precision == "full":
        return 0
    if precision in ("int8", "fp8"):
        return n * k + 4 * n
    group = _group(precision, k) or k
    return n * k // 2 + n * (k // group) * (dtype.itemsize if precision == "int4" else 1)


def rounding_variance(weight: Tensor, precision: Precision) -> float:
    """Returns the mean of (q(w) - w)^2 over the elements of `weight` [N, K], summed in float64."""
    if precision == "full" or not weight.numel():
        return 0.0
    total = 0.0
    for rows in _chunks(weight):
        part = weight[rows]
        total += float((dequantised(round_weight(part, precision), torch.float64) - part).square().sum())
    return total / weight.numel()


def _group(precision: Precision, k: int) -> int | None:
    if precision == "int4":
        return group_size(k)
    if precision == "mxfp4":
        return _MX_BLOCK if k % _MX_BLOCK == 0 else None
    return k


def _chunks(matrix: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    return (slice(i, i + step) for i in range(0, max(1, len(matrix)), step))


def _round(weight: Tensor, precision: Precision, group: int) -> tuple[Tensor, Tensor]:
    w = weight.detach().float()
    if precision == "int8":
        scale = w.abs().amax(-1, keepdim=True) / _INT8_MAX
        return _int8_codes(w, scale).to(torch.int8), scale
    if precision == "fp8":
        scale = _fp8_scale(w)
        return (w / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale
    blocks = w.unflatten(-1, (-1, group))
    if precision == "int4":
        scale = _int4_scale(blocks, weight.dtype)
        codes = _int4_codes(blocks, scale) + 8
    else:
        exponent = _mx_exponent(blocks)
        codes, scale = _e2m1_codes(torch.ldexp(blocks, -exponent)), exponent + 127
    codes = codes.flatten(-2).to(torch.uint8)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return packed, scale.squeeze(-1).to(weight.dtype if precision == "int4" else torch.uint8)


def _round_inputs(precision: Precision, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the inputs a kernel multiplies with, float32 [..., K], and their scale [..., 1] if apart."""
    wide = x.float()
    if precision == "int8":
        scale = wide.abs().amax(-1, keepdim=True) / _INT8_MAX
        return _int8_codes(wide, scale), scale
    if precision == "fp8":
        scale = _fp8_scale(wide)
        codes = (wide * scale.reciprocal()).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        return codes.float(), scale
    if precision == "mxfp4":
        blocks = wide.unflatten(-1, (-1, _MX_BLOCK))
        exponent = _mx_exponent(blocks)
        values = _e2m1_values(_e2m1_codes(torch.ldexp(blocks, -exponent)))
        return torch.ldexp(values, exponent).flatten(-2), None
    return wide, None


def _values(precision: Precision, codes: Tensor) -> Tensor:
    """The numbers that codes stand for before scaling, float32 [N, K]."""
    if precision in ("int8", "fp8"):
        return codes.float()
    nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)
    return nibbles.float() - 8 if precision == "int4" else _e2m1_values(nibbles)


def _multiplier(precision: Precision, scale: Tensor) -> Tensor:
    """The scale as a float32 number, [N, groups]."""
    if precision == "mxfp4":
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    return scale.float()


def _scaled(values: Tensor, multiplier: Tensor) -> Tensor:
    groups = multiplier.shape[1]
    return (values.unflatten(-1, (groups, -1)) * multiplier.unsqueeze(-1)).flatten(-2)


def _int8_codes(w: Tensor, scale: Tensor) -> Tensor:
    # times the reciprocal, rounded half to even: the same codes as vLLM's, ties included
    return (w * torch.where(scale > 0, scale.reciprocal(), 0.0)).round().clamp(-_INT8_MAX, _INT8_MAX)


def _fp8_scale(w: Tensor) -> Tensor:
    limit = torch.tensor(_FP8_MAX, device=w.device)  # torch multiplies by a Python number's reciprocal
    return (w.abs().amax(-1, keepdim=True) / limit).clamp_min(_FP8_MIN_SCALE)


def _int4_scale(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each block [..., G] of the least squared error, [..., 1], a number of `dtype`."""
    amax = blocks.abs().amax(-1, keepdim=True)
    best = torch.ones_like(amax)
    least = torch.full_like(amax, torch.inf)
    for share in _INT4_SHARES:
        scale = (amax * (share / 7)).to(dtype).float()
        scale = torch.where(scale > 0, scale, 1.0)  # a block of zeros
        error = (_int4_codes(blocks, scale) * scale - blocks).square().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def _int4_codes(blocks: Tensor, scale: Tensor) -> Tensor:
    return (blocks / scale).round().clamp(-8, 7)


def _mx_exponent(blocks: Tensor) -> Tensor:
    """log2 of each block's shared scale, int32 [..., 1], as vLLM's `_compute_quant_and_scale` has it.

    The exponent of max|w|, after rounding it to e2m1's one bit of mantissa, less that of 4.0.
    """
    bits = blocks.abs().amax(-1, keepdim=True).view(torch.int32)
    return (((bits + 0x200000) >> 23) - 127 - 2).clamp(-127, 127)


def _e2m1_codes(values: Tensor) -> Tensor:
    """The nearest e2m1 number's code, int32; ties go to the even code; beyond 6 it is 6."""
    grid = torch.tensor(_E2M1, device=values.device)
    middles = (grid[1:] + grid[:-1]) / 2
    # bucketize puts a tie below. Where the even code is above, the boundary moves down by one float.
    middles[1::2] = torch.nextafter(middles[1::2], grid[:1])
    codes = torch.bucketize(values.abs(), middles, out_int32=True)
    return codes + 8 * torch.signbit(values)


def _e2m1_values(codes: Tensor) -> Tensor:
    grid = torch.tensor((*_E2M1, *(-v for v in _E2M1)), device=codes.device)
    return grid[codes.int()]

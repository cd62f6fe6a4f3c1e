"""Entry into a kept layer whose linears run in int8 or fp8: `skip_residual_rms_norm` with its rows rounded.

    y      = the normed row, in float32               (residual add, bridge and norm; `skip_residual_rms_norm.py`)
    scale  = max|y| / 127                             int8
           = max(max|y| / 448, 1 / (448 * 512))       fp8, that is float8_e4m3fn
    row    = round(y / scale)                         ties to even; y is about row * scale

The scales are those of vLLM's `scaled_int8_quant` and of its `scaled_fp8_quant` with a scale per token (its
csrc/quantization). A row of zeros gives zeros; its int8 scale is 0. No row has the int8 code -128.

y is not rounded to the activations' dtype. vLLM's `rms_norm_dynamic_per_token_quant` does round, once after
the division by the root mean square and once after the weight: in bfloat16 its scales lie up to 2^-8 beside
these. Without a bridge that op is the one to use: residual add, norm and rounding in one launch, as here. Ours is
for an entry with a bridge, for which vLLM has no op, and for a weight stored as w - 1, which its op does not
take. AMD's float8_e4m3fnuz is not served.
"""

from typing import Literal

import torch
from torch import Tensor

from sdfp_vllm.kernels.skip_residual_rms_norm import (
    bridge_arguments,
    check_inputs,
    launch,
    runs_kernel,
    wide_reference,
)
from sdfp_vllm.plan.bridge import Bridge

Precision = Literal["int8", "fp8"]
DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FP8_MIN_SCALE = 1 / (448 * 512)


def skip_residual_rms_norm_rounded(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    bridge: Bridge | None = None,
    *,
    precision: Precision,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Adds, bridges, normalises and rounds; writes the new residual stream into `residual`.

    Args:
        branch: [T, H] float32, bfloat16 or float16; the output of the last kept layer's branch.
        residual: [T, H], the same dtype; overwritten, not rounded further than to its dtype.
        weight: [H], the next kept layer's input norm.
        eps: Added to the mean square.
        bridge: Its tensors contiguous and on the same device, any float dtype.
        precision: What the next kept layer's linears take.
        weight_offset: 1.0 where the norm's weight is stored as w - 1 (Gemma).

    Returns:
        The normed rows [T, H] in int8 or float8_e4m3fn, and their scales [T, 1] in float32.

    Raises:
        ValueError: On shapes, strides, dtypes, devices or a precision that do not fit together.
    """
    check_inputs(branch, residual, weight, bridge)
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r}, expected one of {list(DTYPES)}")
    if not runs_kernel(branch):
        return reference(
            branch, residual, weight, eps, bridge, precision=precision, weight_offset=weight_offset
        )
    rows = torch.empty(branch.shape, dtype=DTYPES[precision], device=branch.device)
    scales = torch.empty(branch.shape[0], 1, dtype=torch.float32, device=branch.device)
    _launch(branch, residual, weight, eps, weight_offset, rows, scales, *bridge_arguments(bridge))
    return rows, scales


# An op of its own, so that torch.compile sees one call with declared writes instead of tracing into it.
@torch.library.custom_op(
    "sdfp_vllm::skip_residual_rms_norm_rounded", mutates_args=("residual", "rows", "scales")
)
def _launch(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    weight_offset: float,
    rows: Tensor,
    scales: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> None:
    rounding, out = (1, rows) if rows.dtype is torch.int8 else (2, rows.view(torch.uint8))
    launch(branch, residual, weight, eps, weight_offset, out, scales, rounding, shift, scale, mean, down, up)


@_launch.register_fake
def _(branch, residual, weight, eps, weight_offset, rows, scales, shift, scale, mean, down, up):
    return None


def reference(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    bridge: Bridge | None = None,
    *,
    precision: Precision,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same in torch; also takes float64."""
    normed = wide_reference(branch, residual, weight, eps, bridge, weight_offset)
    largest = normed.abs().amax(-1, keepdim=True)
    if precision == "int8":
        scales = largest / 127
        rows = (normed / scales.clamp_min(torch.finfo(torch.float32).tiny)).round()
    else:
        scales = (largest / 448).clamp_min(FP8_MIN_SCALE)
        rows = normed / scales
    return rows.to(DTYPES[precision]), scales.to(torch.float32)

"""Token ids to the first layer's input: embedding row, residual stream and first norm in one pass.

    residual = round(scale * table[id])                        (scale: Gemma's sqrt(H), else 1)
    out      = residual / sqrt(mean(residual^2) + eps) * (w + o)    (o = 0: Llama; o = 1: Gemma)

RMSNorm: Zhang and Sennrich, arXiv 1910.07467, eq. 4. The norm is taken of the rounded residual, as a
separate embedding would hand it on. An id outside the table gives a row of zeros: padded rows of a
CUDA graph hold whatever an earlier batch left.
"""

import torch
from torch import Tensor

from sdfp_vllm.kernels.checks import FLOATS, check
from sdfp_vllm.kernels.triton_support import runs_triton, tl, triton

MAX_HIDDEN = 32768


@triton.jit
def _kernel(
    ids_ptr,
    table_ptr,
    table_stride,
    residual_ptr,
    residual_stride,
    out_ptr,
    out_stride,
    weight_ptr,
    vocab,
    hidden,
    eps,
    scale,
    weight_offset,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < hidden
    token = tl.load(ids_ptr + row).to(tl.int64)
    width = tl.where((token >= 0) & (token < vocab), hidden, 0)
    h = tl.load(table_ptr + token * table_stride + col, mask=col < width, other=0.0).to(tl.float32)
    rounded = (h * scale).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + row * residual_stride + col, rounded, mask=inside)
    h = rounded.to(tl.float32)
    h *= 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / hidden + eps)
    h *= tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32) + weight_offset
    tl.store(out_ptr + row * out_stride + col, h.to(out_ptr.dtype.element_ty), mask=inside)


def embed_rms_norm(
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    eps: float,
    *,
    scale: float = 1.0,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Looks up, scales and normalises.

    Args:
        ids: int32 or int64 [T].
        table: [V, H] float32, bfloat16 or float16: the whole vocabulary, not a tensor-parallel shard.
        weight: [H], the first layer's input norm.
        eps: Added to the mean square.
        scale: Factor on the embedding, as the model rounds it.
        weight_offset: 1.0 where the norm's weight is stored as w - 1 (Gemma).
        residual, out: [T, H] in the table's dtype, overwritten; None allocates.

    Returns:
        (normed rows [T, H], residual [T, H]).

    Raises:
        ValueError: On shapes, strides, dtypes or devices that do not fit together.
    """
    (rows,), (vocab, hidden) = ids.shape, table.shape
    check("ids", ids, (rows,), (torch.int32, torch.int64), table)
    check("table", table, (vocab, hidden), FLOATS, table)
    check("weight", weight, (hidden,), FLOATS, table)
    residual = table.new_empty(rows, hidden) if residual is None else residual
    out = table.new_empty(rows, hidden) if out is None else out
    check("residual", residual, (rows, hidden), (table.dtype,), table)
    check("out", out, (rows, hidden), (table.dtype,), table)
    if not runs_triton(table):
        normed, h = reference(ids, table, weight, eps, scale=scale, weight_offset=weight_offset)
        return out.copy_(normed), residual.copy_(h)
    if hidden > MAX_HIDDEN:
        raise ValueError(f"rows of {hidden} elements, the kernel holds at most {MAX_HIDDEN}")
    if rows:
        block = triton.next_power_of_2(hidden)
        _kernel[(rows,)](
            ids,
            table,
            table.stride(0),
            residual,
            residual.stride(0),
            out,
            out.stride(0),
            weight,
            vocab,
            hidden,
            eps,
            scale,
            weight_offset,
            BLOCK=block,
            num_warps=8 if block >= 2048 else 4,
        )
    return out, residual


def reference(
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    eps: float,
    *,
    scale: float = 1.0,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The same in torch; also takes float64."""
    wide = torch.promote_types(table.dtype, torch.float32)
    known = (ids >= 0) & (ids < table.shape[0])
    rows = table[torch.where(known, ids, 0).long()].to(wide) * scale
    residual = torch.where(known[:, None], rows, 0.0).to(table.dtype)
    h = residual.to(wide)
    normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + weight_offset)
    return normed.to(table.dtype), residual

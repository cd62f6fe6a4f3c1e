"""From what the target's step left to everything draft step 0 reads, in one launch.

For each row t with request state s = idx_mapping[t]; P is the position of its last accepted token:

    P                = target_positions[query_start_loc[t + 1] - 1 - num_rejected[t]]
    input_ids[t]     = last_sampled[s]                                      (the token of position P + 1)
    positions[t]     = min(P + 1, max_model_len - 1)
    seq_lens[t]      = min(target_seq_lens[t] - num_rejected[t] + 1, max_model_len)
    draft_idx[t]     = s, or -1 where nothing was sampled (the middle of a prefill)
    slot[g, t]       = as in `draft_step.py`, or -1 where draft_idx is -1 or P + 1 is past the limit

and for the rows behind them, which only a padded CUDA graph runs: draft_idx -1, seq_len 0, slot -1.
The draft's own query_start_loc becomes 0, 1, ..., T, T, ...: one token per request. vLLM 0.32 does this
in two kernels and some tensor operations (`target_dependent_ar/speculator.py`, `block_table.py`),
after a pass of the draft over all tokens of the target's step that this draft does not need.
"""

from torch import Tensor, int32, int64

from sdfp_vllm.kernels.checks import check
from sdfp_vllm.kernels.draft_step import PAD_SLOT, KvSlots
from sdfp_vllm.kernels.triton_support import runs_triton, tl, triton

_ROWS = 128  # rows per program


@triton.jit
def _kernel(
    idx_mapping_ptr,
    num_sampled_ptr,
    num_rejected_ptr,
    last_sampled_ptr,
    query_start_loc_ptr,
    target_positions_ptr,
    target_seq_lens_ptr,
    draft_idx_ptr,
    input_ids_ptr,
    positions_ptr,
    seq_lens_ptr,
    draft_query_start_loc_ptr,
    layout_ptr,
    slot_mapping_ptr,
    slot_mapping_stride,
    rows,
    all_rows,
    max_model_len,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    tl.store(draft_query_start_loc_ptr + row, tl.minimum(row, rows), mask=row <= all_rows)

    state = tl.load(idx_mapping_ptr + row, mask=live, other=-1).to(tl.int64)
    known = live & (state >= 0)
    rejected = tl.load(num_rejected_ptr + row, mask=live, other=0)
    last = tl.load(query_start_loc_ptr + row + 1, mask=live, other=1) - 1 - rejected
    position = tl.load(target_positions_ptr + last, mask=live, other=0) + 1
    past = position >= max_model_len
    position = tl.minimum(position, max_model_len - 1)
    seq_len = tl.load(target_seq_lens_ptr + row, mask=live, other=0) - rejected + 1
    seq_len = tl.where(live, tl.minimum(seq_len, max_model_len), 0)
    token = tl.load(last_sampled_ptr + state, mask=known, other=0)
    drafting = known & (tl.load(num_sampled_ptr + row, mask=live, other=0) > 0)

    inside = row < all_rows
    tl.store(draft_idx_ptr + row, tl.where(drafting, state, -1), mask=inside)
    tl.store(seq_lens_ptr + row, seq_len, mask=inside)
    tl.store(input_ids_ptr + row, token.to(tl.int32), mask=live)
    tl.store(positions_ptr + row, position, mask=live)
    for g in tl.static_range(GROUPS):
        table = tl.load(layout_ptr + g).to(tl.pointer_type(tl.int32))
        stride = tl.load(layout_ptr + GROUPS + g)
        size = tl.load(layout_ptr + 2 * GROUPS + g)
        block = tl.minimum(position // size, tl.load(layout_ptr + 3 * GROUPS + g) - 1)
        number = tl.load(table + state * stride + block, mask=drafting, other=0)
        slot = number.to(tl.int64) * size + position % size
        tl.store(
            slot_mapping_ptr + g * slot_mapping_stride + row,
            tl.where(drafting & (past == 0), slot, -1),
            mask=inside,
        )


def draft_begin(
    idx_mapping: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    last_sampled: Tensor,
    query_start_loc: Tensor,
    target_positions: Tensor,
    target_seq_lens: Tensor,
    draft_idx: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    draft_query_start_loc: Tensor,
    slots: KvSlots,
    max_model_len: int,
) -> None:
    """Fills the inputs of draft step 0 for T requests, and marks the rows up to N as padding, in place.

    Args:
        idx_mapping: int32 or int64 [T], row -> request state; below 0 for a dummy row.
        num_sampled: int32 [>= T], tokens the target sampled for the row in this step.
        num_rejected: int32 [>= T], drafts it rejected, still counted in `target_seq_lens`.
        last_sampled: int64 [S], the token sampled last, by request state.
        query_start_loc: int32 [>= T + 1], where the rows' tokens start in the target's batch.
        target_positions: int64 [tokens of the target's batch].
        target_seq_lens: int32 [>= T].
        draft_idx, seq_lens: int64, int32 [N], written throughout.
        input_ids, positions: int32, int64 [>= T]; rows up to T are written.
        draft_query_start_loc: int32 [N + 1], written throughout.
        slots: Where step 0's K/V goes; `slot_mapping` has at least N columns.
        max_model_len: Positions there are.

    Raises:
        ValueError: On shapes, strides, dtypes or devices that do not fit together.
    """
    rows, all_rows = idx_mapping.shape[0], draft_idx.shape[0]
    check("idx_mapping", idx_mapping, (rows,), (int32, int64), draft_idx)
    for name, tensor, dtype, least in (
        ("num_sampled", num_sampled, int32, rows),
        ("num_rejected", num_rejected, int32, rows),
        ("last_sampled", last_sampled, int64, 0),
        ("query_start_loc", query_start_loc, int32, rows + 1),
        ("target_positions", target_positions, int64, 0),
        ("target_seq_lens", target_seq_lens, int32, rows),
        ("draft_idx", draft_idx, int64, rows),
        ("input_ids", input_ids, int32, rows),
        ("positions", positions, int64, rows),
        ("seq_lens", seq_lens, int32, all_rows),
        ("draft_query_start_loc", draft_query_start_loc, int32, all_rows + 1),
        ("slots.slot_mapping[0]", slots.slot_mapping[0], int64, all_rows),
    ):
        check(name, tensor, (None,), (dtype,), draft_idx)
        if tensor.shape[0] < least:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, expected at least {least}")
    arguments = (idx_mapping, num_sampled, num_rejected, last_sampled, query_start_loc, target_positions)
    outputs = (draft_idx, input_ids, positions, seq_lens, draft_query_start_loc)
    if not runs_triton(draft_idx):
        reference(*arguments, target_seq_lens, *outputs, slots, max_model_len)
        return
    _kernel[(triton.cdiv(all_rows + 1, _ROWS),)](
        *arguments,
        target_seq_lens,
        *outputs,
        slots.layout,
        slots.slot_mapping,
        slots.slot_mapping.stride(0),
        rows,
        all_rows,
        max_model_len,
        GROUPS=len(slots.block_tables),
        ROWS=_ROWS,
        num_warps=4,
    )


def reference(
    idx_mapping: Tensor,
    num_sampled: Tensor,
    num_rejected: Tensor,
    last_sampled: Tensor,
    query_start_loc: Tensor,
    target_positions: Tensor,
    target_seq_lens: Tensor,
    draft_idx: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    draft_query_start_loc: Tensor,
    slots: KvSlots,
    max_model_len: int,
) -> None:
    """The same in torch."""
    rows, all_rows = idx_mapping.shape[0], draft_idx.shape[0]
    state, rejected = idx_mapping.long(), num_rejected[:rows]
    known = state >= 0
    drafting = known & (num_sampled[:rows] > 0)
    last = query_start_loc[1 : rows + 1] - 1 - rejected
    position = target_positions[last.long()] + 1
    past = position >= max_model_len
    position = position.clamp_max(max_model_len - 1)

    draft_query_start_loc[: all_rows + 1] = draft_query_start_loc.new_ones(all_rows + 1).cumsum(0) - 1
    draft_query_start_loc[: all_rows + 1].clamp_(max=rows)
    draft_idx.fill_(-1)
    draft_idx[:rows] = state.masked_fill(~drafting, -1)
    seq_lens[:all_rows] = 0
    seq_lens[:rows] = (target_seq_lens[:rows] - rejected + 1).clamp_max(max_model_len)
    input_ids[:rows] = last_sampled[state.clamp_min(0)].masked_fill(~known, 0).int()
    positions[:rows] = position
    slots.slot_mapping[:, :all_rows] = PAD_SLOT
    at = drafting & ~past
    for g, (table, size) in enumerate(zip(slots.block_tables, slots.block_sizes, strict=True)):
        block = (position // size).clamp_max(table.shape[1] - 1)
        slot = table[state[at], block[at]].long() * size + position[at] % size
        slots.slot_mapping[g, :rows][at] = slot

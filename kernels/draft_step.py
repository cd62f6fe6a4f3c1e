"""From one draft step's logits to everything the next step reads, in one launch.

For each row t with request state s = idx_mapping[t] and fed position p = positions[t]:

    token            = argmax_v(logits[t, v])                               temperature[s] = 0
                       argmax_v(logits[t, v] / temperature[s] + noise)      else; noise by (seeds[s], p, v)
    draft_tokens[t, step] = input_ids[t] = token
    logits_cache[s, step] = logits[t]                                       (verification's draft distribution)
    positions[t]     = min(p + 1, max_model_len - 1)
    seq_lens[t]      = min(seq_lens[t] + 1, max_model_len)
    slot[g, t]       = block_table[g][s, (p + 1) / B_g] * B_g + (p + 1) % B_g, or -1 past the last position

Sampling is Gumbel-max (`draft_noise.py`). A draw is keyed by the position before the sampled token, which
is the one that was fed, and slots and the limit follow vLLM's `eagle_step_update_slot_mapping_and_metadata`
(V1) and `compute_slot_mappings` (V2); but past the limit the slot is -1 (vLLM's PAD), so nothing is written
where a verified token's K/V may lie. Rows with s < 0 are padding: they get slot -1 and nothing else.

A row of logits is split over programs; the one that finishes last (an atomic count per row, which it
resets) reduces the partial maxima and moves the row on. Ties go to the lowest token.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdfp_vllm.kernels.checks import FLOATS, check
from sdfp_vllm.kernels.draft_noise import gumbel_noise, gumbel_noise_reference
from sdfp_vllm.kernels.triton_support import runs_triton, tl, triton

PAD_SLOT = -1
_CHUNK = 4096  # logits per program


@dataclass(frozen=True)
class KvSlots:
    """Block tables of the G KV cache groups that the draft writes, and where their slots go.

    Attributes:
        block_tables: Per group int32 [S, blocks], by request state; their memory must stay where it is.
        block_sizes: Per group, token positions in a block.
        slot_mapping: int64 [G, N], N at least the rows of a step; overwritten.
    """

    block_tables: tuple[Tensor, ...]
    block_sizes: tuple[int, ...]
    slot_mapping: Tensor
    # The same for the kernel: addresses, row strides, block sizes and blocks of a row, int64 [4, G].
    layout: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        groups = len(self.block_tables)
        check("slot_mapping", self.slot_mapping, (groups, None), (torch.int64,), self.slot_mapping)
        if len(self.block_sizes) != groups or not groups:
            raise ValueError(f"{groups} block tables with {len(self.block_sizes)} block sizes")
        for g, table in enumerate(self.block_tables):
            check(f"block_tables[{g}]", table, (None, None), (torch.int32,), self.slot_mapping)
        rows = [
            [t.data_ptr() for t in self.block_tables],
            [t.stride(0) for t in self.block_tables],
            list(self.block_sizes),
            [t.shape[1] for t in self.block_tables],
        ]
        layout = torch.tensor(rows, dtype=torch.int64, device=self.slot_mapping.device)
        object.__setattr__(self, "layout", layout)


class DraftWorkspace:
    """Scratch of `draft_step`, made once: a captured graph must find it where it was.

    Attributes:
        value: float32 [T, chunks], maximum of each chunk of a row.
        token: int32 [T, chunks], where it lies.
        arrived: int32 [T], chunks done; zero between launches.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str):
        chunks = -(-vocab_size // _CHUNK)
        self.value = torch.empty(rows, chunks, dtype=torch.float32, device=device)
        self.token = torch.empty(rows, chunks, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(rows, dtype=torch.int32, device=device)


@triton.jit
def _kernel(
    logits_ptr,
    logits_stride,
    idx_mapping_ptr,
    temperature_ptr,
    seeds_ptr,
    step_ptr,
    positions_ptr,
    seq_lens_ptr,
    input_ids_ptr,
    draft_tokens_ptr,
    draft_tokens_stride,
    cache_ptr,
    cache_stride_state,
    cache_stride_step,
    layout_ptr,
    slot_mapping_ptr,
    slot_mapping_stride,
    value_ptr,
    token_ptr,
    arrived_ptr,
    vocab,
    max_model_len,
    chunks,
    GROUPS: tl.constexpr,
    SAMPLE: tl.constexpr,
    CACHE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    state = tl.load(idx_mapping_ptr + row).to(tl.int64)
    if state < 0:
        if chunk == 0:
            for g in tl.static_range(GROUPS):
                tl.store(slot_mapping_ptr + g * slot_mapping_stride + row, -1)
        return
    step = tl.load(step_ptr)
    position = tl.load(positions_ptr + row)

    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    raw = tl.load(logits_ptr + row * logits_stride + at, mask=inside, other=float("-inf"))
    if CACHE:
        cached = cache_ptr + state * cache_stride_state + step * cache_stride_step + at
        tl.store(cached, raw.to(cache_ptr.dtype.element_ty), mask=inside)
    score = raw.to(tl.float32)
    if SAMPLE:
        temperature = tl.load(temperature_ptr + state)
        if temperature > 0.0:
            noise = gumbel_noise(tl.load(seeds_ptr + state), position, at)
            score = tl.where(inside, score / temperature + noise, float("-inf"))
    best, where = tl.max(score, axis=0, return_indices=True)
    tl.store(value_ptr + row * chunks + chunk, best)
    tl.store(token_ptr + row * chunks + chunk, chunk * CHUNK + where)

    # Release what this program stored, acquire what the others did.
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == chunks - 1:
        part = tl.arange(0, CHUNKS)
        parts = tl.load(
            value_ptr + row * chunks + part,
            mask=part < chunks,
            other=float("-inf"),
            cache_modifier=".cg",
        )
        _, winner = tl.max(parts, axis=0, return_indices=True)
        token = tl.load(token_ptr + row * chunks + winner, cache_modifier=".cg")
        token = tl.minimum(token, vocab - 1)  # a row of NaN must not leave the vocabulary
        tl.store(arrived_ptr + row, 0)
        tl.store(draft_tokens_ptr + row * draft_tokens_stride + step, token.to(tl.int64))
        tl.store(input_ids_ptr + row, token)

        position += 1
        past = position >= max_model_len
        position = tl.minimum(position, max_model_len - 1)
        tl.store(positions_ptr + row, position)
        tl.store(seq_lens_ptr + row, tl.minimum(tl.load(seq_lens_ptr + row) + 1, max_model_len))
        for g in tl.static_range(GROUPS):
            table = tl.load(layout_ptr + g).to(tl.pointer_type(tl.int32))
            stride = tl.load(layout_ptr + GROUPS + g)
            size = tl.load(layout_ptr + 2 * GROUPS + g)
            block = tl.minimum(position // size, tl.load(layout_ptr + 3 * GROUPS + g) - 1)
            slot = tl.load(table + state * stride + block).to(tl.int64) * size + position % size
            tl.store(slot_mapping_ptr + g * slot_mapping_stride + row, tl.where(past, -1, slot))


def draft_step(
    logits: Tensor,
    idx_mapping: Tensor,
    temperature: Tensor | None,
    seeds: Tensor | None,
    step: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    input_ids: Tensor,
    draft_tokens: Tensor,
    slots: KvSlots,
    max_model_len: int,
    workspace: DraftWorkspace,
    logits_cache: Tensor | None = None,
) -> None:
    """Chooses the draft token of every row and moves the row to the next step, in place.

    T rows (padding included), S request states, k steps a round.

    Args:
        logits: [T, V] float32, bfloat16 or float16, before temperature.
        idx_mapping: int32 or int64 [T], row -> request state; below 0 for padding.
        temperature, seeds: float32 [S] and int64 [S]; None drafts greedily everywhere.
        step: int64 scalar, the number of this step, from 0. Read on the device: a graph may be replayed
            with another value.
        positions, seq_lens, input_ids: int64, int32, int32 [>= T]; read, then the next step's.
        draft_tokens: int64 [>= T, >= k]; column `step` is written.
        slots: Where the next step's K/V goes.
        max_model_len: Positions there are.
        workspace: For at least T rows of at least V.
        logits_cache: [S, k, V], any float dtype; None keeps no logits.

    Raises:
        ValueError: On shapes, strides, dtypes or devices that do not fit together.
    """
    rows, vocab = logits.shape
    ids = (torch.int32, torch.int64)
    check("logits", logits, (rows, vocab), FLOATS, logits)
    check("idx_mapping", idx_mapping, (rows,), ids, logits)
    check("step", step, (), (torch.int64,), logits)
    for name, tensor, dtype in (
        ("positions", positions, torch.int64),
        ("seq_lens", seq_lens, torch.int32),
        ("input_ids", input_ids, torch.int32),
        ("draft_tokens", draft_tokens, torch.int64),
        ("slots.slot_mapping[0]", slots.slot_mapping[0], torch.int64),
    ):
        check(name, tensor, (None,) * tensor.dim(), (dtype,), logits)
        if tensor.shape[0] < rows:
            raise ValueError(f"{name} has {tensor.shape[0]} rows, the logits {rows}")
    if (temperature is None) != (seeds is None):
        raise ValueError("temperature and seeds come together")
    if temperature is not None and seeds is not None:
        check("temperature", temperature, (None,), (torch.float32,), logits)
        check("seeds", seeds, temperature.shape, (torch.int64,), logits)
    if logits_cache is not None:
        check("logits_cache", logits_cache, (None, None, vocab), FLOATS, logits)
    chunks = -(-vocab // _CHUNK)
    if workspace.value.shape[0] < rows or workspace.value.shape[1] < chunks:
        raise ValueError(f"workspace for {list(workspace.value.shape)}, the step needs [{rows}, {chunks}]")
    arguments = (logits, idx_mapping, temperature, seeds, step, positions, seq_lens, input_ids, draft_tokens)
    if not runs_triton(logits):
        reference(*arguments, slots, max_model_len, logits_cache)
        return
    if not rows:
        return
    _kernel[(rows, chunks)](
        logits,
        logits.stride(0),
        idx_mapping,
        temperature,
        seeds,
        step,
        positions,
        seq_lens,
        input_ids,
        draft_tokens,
        draft_tokens.stride(0),
        logits_cache,
        0 if logits_cache is None else logits_cache.stride(0),
        0 if logits_cache is None else logits_cache.stride(1),
        slots.layout,
        slots.slot_mapping,
        slots.slot_mapping.stride(0),
        workspace.value,
        workspace.token,
        workspace.arrived,
        vocab,
        max_model_len,
        chunks,
        GROUPS=len(slots.block_tables),
        SAMPLE=temperature is not None,
        CACHE=logits_cache is not None,
        CHUNK=_CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        num_warps=8,
    )


def reference(
    logits: Tensor,
    idx_mapping: Tensor,
    temperature: Tensor | None,
    seeds: Tensor | None,
    step: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    input_ids: Tensor,
    draft_tokens: Tensor,
    slots: KvSlots,
    max_model_len: int,
    logits_cache: Tensor | None = None,
) -> None:
    """The same in torch."""
    rows = logits.shape[0]
    slots.slot_mapping[:, :rows] = PAD_SLOT
    live = (idx_mapping >= 0).nonzero().flatten()
    state, position, j = idx_mapping[live].long(), positions[live], int(step)
    scores = logits[live].float()
    if logits_cache is not None:
        logits_cache[state, j] = logits[live].to(logits_cache.dtype)
    if temperature is not None and seeds is not None:
        t = temperature[state, None]
        noise = gumbel_noise_reference(seeds[state], position, torch.arange(scores.shape[1]).to(seeds))
        scores = torch.where(t > 0, scores / torch.where(t > 0, t, 1.0) + noise, scores)
    token = scores.argmax(-1)
    draft_tokens[live, j] = token
    input_ids[live] = token.int()
    past = position + 1 >= max_model_len
    position = (position + 1).clamp_max(max_model_len - 1)
    positions[live] = position
    seq_lens[live] = (seq_lens[live] + 1).clamp_max(max_model_len)
    for g, (table, size) in enumerate(zip(slots.block_tables, slots.block_sizes, strict=True)):
        block = (position // size).clamp_max(table.shape[1] - 1)
        slot = table[state, block].long() * size + position % size
        slots.slot_mapping[g, live] = torch.where(past, PAD_SLOT, slot)

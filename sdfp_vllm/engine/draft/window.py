"""The KV cache as a draft with a window sees it: the same blocks under another block table, nothing copied.

A request has computed n tokens (positions 0 .. n - 1) in blocks of B. With F = ceil(sinks / B), the draft's table lists
blocks 0 .. F - 1, then those from floor((n - last) / B) on, in which the drafts' own K/V lie as well; the G blocks
between them are the gap, and a length of m tokens becomes m - G B. Attention takes no positions from a table:
rotary ones are in the keys already, and the one query attends to all that comes before it. G is fixed for a round.
Slots are computed from the unedited table, so what a draft writes goes where it always does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sdfp_vllm.engine.upstream.symbols import (
    AttentionLayerBase,
    CommonAttentionMetadata,
    FullAttentionSpec,
    VllmConfig,
    get_layers_from_vllm_config,
    init_logger,
)
from sdfp_vllm.plan.window import DraftWindow

logger = init_logger(f"vllm.{__name__}")


def reaches(window: DraftWindow, longest: int) -> bool:
    """Whether a context of at most `longest` tokens can have a gap; where not, all is as without a window."""
    return longest > max(window.sinks + window.last, window.beyond)


def longest_seen(window: DraftWindow, block_size: int) -> int:
    """Most tokens of a context that are left, whatever its length."""
    return max(window.beyond, (_first_blocks(window, block_size) + 1) * block_size - 1 + window.last)


def gaps(window: DraftWindow, computed: torch.Tensor, block_size: int) -> torch.Tensor:
    """Blocks left out of contexts of `computed` tokens, int32 [batch] both."""
    start = (computed - window.last).clamp_min(0) // block_size
    gap = (start - _first_blocks(window, block_size)).clamp_min(0)
    return gap.masked_fill(computed <= window.beyond, 0)


def without_gaps(
    window: DraftWindow, table: torch.Tensor, gap: torch.Tensor, block_size: int
) -> torch.Tensor:
    """A block table, int32 [batch, blocks], without the `gap[i]` blocks after the first of each row; as wide."""
    at = torch.arange(table.shape[1], device=table.device)
    skipped = gap[:, None] * (at >= _first_blocks(window, block_size))
    # What lies behind a shorter row's end is never read, but has to be a block.
    return table.gather(1, (at + skipped).clamp_max(table.shape[1] - 1))


def _first_blocks(window: DraftWindow, block_size: int) -> int:
    return -(-window.sinks // block_size)


class WindowedMetadata:
    """One KV cache group's metadata of a round, edited for layers that read through a window.

    Args:
        cad: Of one query per request, before the first draft step.
        whole: Requests that are left as they are; none where empty.
    """

    def __init__(
        self, window: DraftWindow, cad: CommonAttentionMetadata, block_size: int, whole: Sequence[bool] = ()
    ):
        gap = gaps(window, cad.seq_lens, block_size)
        if any(whole):
            gap = gap.masked_fill(torch.tensor(whole, device=gap.device), 0)
        self._table = without_gaps(window, cad.block_table_tensor, gap, block_size)
        self._tokens = gap * block_size
        # With one that is left as it is, all lengths may be as long as they were.
        self._longest = None if any(whole) else longest_seen(window, block_size)

    def at(self, cad: CommonAttentionMetadata, step: int) -> CommonAttentionMetadata:
        """`cad`, which has been moved on to draft step `step` (from 1), as the window shows it."""
        upper = cad.seq_lens_cpu_upper_bound
        most = cad.max_seq_len if self._longest is None else self._longest + step
        changes: dict[str, Any] = {
            "block_table_tensor": self._table,
            # Past the model's maximum length vLLM sets a length of 1.
            "seq_lens": (cad.seq_lens - self._tokens).clamp_min(1),
            "max_seq_len": min(cad.max_seq_len, most),
            "seq_lens_cpu_upper_bound": None if upper is None else upper.clamp_max(most),
        }
        return replace(cad, **changes)


def windowed(
    window: DraftWindow | None,
    groups: Mapping[int, CommonAttentionMetadata],
    block_sizes: Mapping[int, int],
    whole: Sequence[bool],
) -> dict[int, WindowedMetadata]:
    """What layers that read through the window get instead, by KV cache group; empty where none has a gap."""
    if window is None or (whole and all(whole)):
        return {}
    return {
        gid: WindowedMetadata(window, cad, block_sizes[gid], whole)
        for gid, cad in groups.items()
        if reaches(window, cad.max_seq_len)
    }


def narrowed_layers(window: DraftWindow | None, vllm_config: VllmConfig, names: Iterable[str]) -> set[str]:
    """Those of the attention layers `names` that `window` narrows: plain attention to the whole context.

    A layer with a window of its own (sliding, chunked) keeps it, and so does one with another kind of cache. Where that
    is all there is, the log says so.
    """
    if window is None:
        return set()
    attention = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
    # The layer's own specification: groups may be told to hold all tokens for layers that attend to few.
    specs = {name: attention[name].get_kv_cache_spec(vllm_config) for name in names}
    narrowed = {name for name, spec in specs.items() if type(spec) is FullAttentionSpec}
    if not narrowed:
        logger.warning(
            "Drafts attend to what their layers do, and not only to %s: all have a window of their own or another kind "
            "of cache.",
            window,
        )
    return narrowed

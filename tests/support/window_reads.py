"""What drafts read of the KV cache: an engine's draft steps, token slot by token slot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sdfp_vllm.plan.window import DraftWindow
from tests.support.engines import runner


class Reads:
    """Compares the slots that each draft step of an engine reads with those of the positions it should see.

    Attributes:
        rows: Requests over draft steps and layers.
        gapped: Those of them that did not see all of their context.
        hidden: What each draft step's forward gave.
        whole: Rows of the round that see all of their context, whatever the window; set by who decides it.
    """

    def __init__(self, llm: Any, own_window: set[str]):
        self.runner, self.drafter = runner(llm), runner(llm).drafter
        self.own_window = own_window
        self.rows = self.gapped = 0
        self.hidden: list[torch.Tensor] = []
        self.wrong: list[tuple[str, int]] = []
        self.whole: list[bool] = []
        self._computed: list[int] = []

    def round(self, propose: Any, *args: Any, **kwargs: Any) -> Any:
        self._computed = []
        return propose(*args, **kwargs)

    def step(self, forward: Any, metadata: dict[str, Any], slots: dict[str, torch.Tensor], *args: Any) -> Any:
        out = forward(metadata, slots, *args)
        batch = len(next(iter(metadata.values())).seq_lens)
        positions = self.drafter.positions[:batch].tolist()
        self._computed = self._computed or positions  # of the first step: what the target has computed
        self.hidden.append(out[:batch].clone())
        for name, built in metadata.items():
            gid = next(g.kv_cache_group_id for g in self.drafter.draft_attn_groups if name in g.layer_names)
            own = self.runner.input_batch.block_table[gid]
            whole, size = own.get_device_tensor(batch), own.block_size
            for row, (position, computed) in enumerate(zip(positions, self._computed, strict=True)):
                if slots[name][row] < 0:  # past the last position
                    continue
                all_ = name in self.own_window or (self.whole and self.whole[row])
                window = None if all_ else self.drafter.window
                want = [slot(whole[row], p, size) for p in positions_seen(window, computed, position, size)]
                got = [slot(built.block_table[row], q, size) for q in range(int(built.seq_lens[row]))]
                if got != want or got[-1] != int(slots[name][row]):
                    self.wrong.append((name, position))
                self.rows += 1
                self.gapped += len(want) <= position
        return out


def slot(row: torch.Tensor, position: int, size: int) -> int:
    return int(row[position // size]) * size + position % size


def positions_seen(window: DraftWindow | None, computed: int, position: int, size: int) -> list[int]:
    """By what the documentation says: whole blocks with a sink, one of the last tokens, or a draft in them."""
    if window is None or computed <= window.beyond:
        return list(range(position + 1))
    wanted = {*range(window.sinks), *range(computed - window.last, position + 1)}
    blocks = {p // size for p in wanted if p >= 0}
    return [p for p in range(position + 1) if p // size in blocks]


@contextlib.contextmanager
def watched(llm: Any, own_window: set[str] = frozenset()) -> Iterator[Reads]:  # type: ignore[assignment]
    """Watches the draft steps of `llm`; layers named in `own_window` must read all that they always do."""
    drafter, reads = runner(llm).drafter, Reads(llm, own_window)
    propose, forward = drafter.propose, drafter._forward
    drafter.propose = lambda *args, **kwargs: reads.round(propose, *args, **kwargs)
    drafter._forward = lambda *args: reads.step(forward, *args)
    try:
        yield reads
    finally:
        del drafter.propose, drafter._forward

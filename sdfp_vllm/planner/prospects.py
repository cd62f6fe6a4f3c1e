"""What costs alone say of a plan, before anything is tried: whether drafts could pay, were all of them accepted."""

from __future__ import annotations

import torch

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.cost import measure_costs
from sdfp_vllm.planner.search import MAX_TRIED, WORTHWHILE
from sdfp_vllm.planner.stack import DecoderStack

# What rounded drafts of real models were accepted by, a step, where nothing was skipped: for the way out only.
_TYPICAL = 0.95
_ROWS, _SECONDS = 5, 1.5


def whole_at_lowest(costs: Costs) -> DraftView:
    """The whole target at the precision that is fastest here."""
    layers = range(costs.num_layers)
    views = [DraftView.at(layers, p) for p in costs.precisions]
    return min(views, key=lambda view: costs.layers_ms(view, 1))


def _with_its_head(costs: Costs) -> Costs:
    """With the fastest head over all tokens for the draft's."""
    return costs.model_copy(update={"draft_head": min(costs.head.values(), key=lambda column: column[0])})


def refuse_hopeless(stack: DecoderStack, costs: Costs) -> None:
    """Refuses a dtype in which even drafts of the whole target, rounded and all accepted, would not pay.

    A CPU whose half-precision products slow down with every row is such a place. Where nothing can be rounded
    there is nothing to go by, and no refusal.

    Raises:
        SdfpError: With what float32 would give, where that is better.
    """
    view, costs = whole_at_lowest(costs), _with_its_head(costs)
    if not view.rounded or costs.bound(view, MAX_TRIED) > WORTHWHILE:
        return
    rows = costs.rows.index(4) if 4 in costs.rows else -1
    why = (
        f"a draft step costs {costs.draft_ms(view) / costs.plain_ms():.2f} of a step of {costs.dtype}, and verifying "
        f"{costs.rows[rows]} rows {costs.target_ms(costs.rows[rows]) / costs.target_ms(1):.1f}: on this machine drafts "
        "of the whole model cannot pay even if all are accepted"
    )
    way_out = "Serve without SDFP, or go on with --anyway."
    if costs.dtype != "float32":
        other = _with_its_head(
            measure_costs(
                stack,
                precisions=[p for p in costs.precisions if p != "full"],
                max_rows=_ROWS,
                batch_rows=(),
                seconds=_SECONDS,
                dtype=torch.float32,
            )
        )
        best = max(other.speedup(view, k, sum(_TYPICAL**j for j in range(k + 1))) for k in range(1, _ROWS))
        plain, half = 1e3 / other.plain_ms(), 1e3 / costs.plain_ms()
        way_out = (
            f"Plan for --dtype float32: plain decoding {plain:.1f} tokens/s, with drafts about {plain * best:.1f} "
            f"(plain {costs.dtype}: {half:.1f}). Or serve without SDFP, or go on with --anyway."
        )
    raise SdfpError("--dtype", why, way_out)

"""A plan of another machine, priced on this one: costs are measured anew, and what follows from them is worked out again.

What drafts are accepted by belongs to the model and stays; what they cost belongs to the machine. So neither a search nor
text is needed: the view is kept, its draft lengths are chosen by the new costs, and the curve says what other views would
give here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch
from rich.console import Console

from sdfp_vllm.common.progress import stages
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import fingerprint, resolve_model_dir
from sdfp_vllm.plan.model_files import BESIDE
from sdfp_vllm.plan.parcel import BRIDGE_FILE, HEAD_FILE, PlanParcel
from sdfp_vllm.plan.schema import Candidate, Prediction, SkipPlan
from sdfp_vllm.plan.store import default_plan_dir, load_parcel, save_plan
from sdfp_vllm.plan.view import BRANCHES
from sdfp_vllm.planner.cost import measure_bridge_ms, measure_costs
from sdfp_vllm.planner.engine_overheads import overheads_of
from sdfp_vllm.planner.head import measure_heads
from sdfp_vllm.planner.options import DTYPES, PlanOptions
from sdfp_vllm.planner.rounded import layer_products, usable_precisions
from sdfp_vllm.planner.search import MAX_TRIED, WORTHWHILE, lengths_by_batch
from sdfp_vllm.planner.stack import DecoderStack, load_target
from sdfp_vllm.planner.work import writable


@dataclass(frozen=True)
class Refreshed:
    """A plan with this machine's costs.

    Attributes:
        other: The view of the curve that is predicted to be faster here, where there is one.
        other_speedup: What it is predicted to give.
    """

    plan: SkipPlan
    folder: Path
    other: Candidate | None
    other_speedup: float


def refresh_costs(
    plan: Path,
    model: str | None = None,
    *,
    out: Path | None = None,
    options: PlanOptions | None = None,
    console: Console | None = None,
) -> Refreshed:
    """Measures the costs of a plan on this machine, and saves the plan with them.

    Args:
        plan: Its folder. It is left as it is, unless it is the output folder: other machines may share it.
        model: A folder or a Hugging Face id; None for the one beside which the plan lies, else the one that it names.
        out: Output folder; None for the default place, where the engine of this machine looks first.
        options: `dtype` ("auto": the plan's), `eager`, `run_check` (False: no engine is asked what it adds),
            `revision`, `trust_remote_code`; the rest means nothing here.
        console: Where progress is shown; None shows none.

    Raises:
        SdfpError: If the plan is damaged or another model's, does not say what its drafts are accepted by, or uses
            a precision that this machine has no kernel for.
    """
    options = options or PlanOptions()
    held = load_parcel(plan)
    old = held.plan
    name = model or _beside(Path(held.source)) or old.model
    revision = options.revision or (old.revision if name == old.model else None)
    rates = _acceptance(old, held.source)
    model_dir = resolve_model_dir(name, revision)
    identity = fingerprint(model_dir)
    parcel = load_parcel(plan, identity)
    dtype = options.dtype if options.dtype != "auto" or not old.costs else old.costs.dtype
    eager = options.eager or bool(old.costs and old.costs.engine == "eager")
    options = replace(options, dtype=dtype, eager=eager)
    folder = writable(out or default_plan_dir(identity))
    with stages(console) as bar:
        with bar.step("Loading the model", 1):
            stack = DecoderStack(
                load_target(model_dir, DTYPES[dtype], options.device, options.trust_remote_code)
            )
        with bar.step("Costs on this machine", 1):
            costs = _measured(stack, parcel, max(len(rates), MAX_TRIED) + 1)
        if options.run_check:
            with bar.step("What the engine adds", 1):
                can_round = {b: stack.can_round(b) for b in BRANCHES}
                costs = overheads_of(model_dir, identity, options, costs, can_round)
    made = _priced(old, costs, rates).model_copy(update={"model": name, "revision": revision})
    save_plan(made, folder, parcel.files.get(BRIDGE_FILE), parcel.files.get(HEAD_FILE))
    return Refreshed(made, folder, *_faster(made))


def _beside(folder: Path) -> str | None:
    """The model beside whose files a plan's folder lies."""
    model = folder.parent
    return str(model) if folder.name == BESIDE and (model / "config.json").is_file() else None


def _faster(plan: SkipPlan) -> tuple[Candidate | None, float]:
    """The view of the curve that would be faster than the plan's by more than predictions err, and its speedup; else None."""
    if plan.view.bridges is not None:
        return None, 0.0  # the curve's costs hold the bridges of the plan's view
    gains = [(max(c.speedup[1:], default=0.0), c) for c in plan.curve if c.view != plan.view.branches]
    gain, best = max(gains, key=lambda g: g[0], default=(0.0, None))
    return (best, gain) if gain > WORTHWHILE * max(plan.prediction.speedup, 1.0) else (None, 0.0)


def _acceptance(plan: SkipPlan, source: str) -> list[float]:
    """Chance that draft token j is accepted, given that all before it were."""
    if plan.chances is not None:
        return plan.chances.acceptance
    for point in plan.curve:
        if point.view == plan.view.branches and point.acceptance:
            return point.acceptance
    raise SdfpError(
        f"plan {source}",
        "does not say how often its drafts are accepted, so costs alone come to nothing",
        f"Make it anew with `sdfp plan {plan.model_argument}`.",
    )


def _measured(stack: DecoderStack, parcel: PlanParcel, rows: int) -> Costs:
    """This machine's times for every precision there is a kernel for, of which the plan's must be some."""
    plan = parcel.plan
    head = plan.view.head
    weights = layer_products(stack.layers[0])
    dtype = next(stack.head.parameters()).dtype
    usable = usable_precisions(weights, dtype, "auto")
    for needed in sorted({*plan.used_precisions(), head.precision} - {"full", *usable}):
        try:
            usable += usable_precisions(weights, dtype, needed)  # there, if not faster than full
        except SdfpError as e:
            raise SdfpError(
                f"plan {parcel.source}",
                f"drafts in {needed}, for which this machine has no kernel ({e.what})",
                f"Make one here with `sdfp plan {plan.model_argument}`.",
            ) from e
    costs = measure_costs(stack, precisions=usable, max_rows=rows)
    if head.tokens is not None or head.precision != "full":
        costs = costs.model_copy(update={"draft_head": _head_ms(stack, parcel, costs)})
    bridges = [measure_bridge_ms(stack, bridge) for bridge in parcel.bridges().values()]
    return costs.model_copy(update={"draft_overhead_ms": costs.draft_overhead_ms + sum(bridges)})


def _head_ms(stack: DecoderStack, parcel: PlanParcel, costs: Costs) -> list[float]:
    """Milliseconds of the draft's head at each of the costs' rows."""
    precision, tokens = parcel.plan.view.head.precision, parcel.tokens()
    whole = costs.head[precision]
    if tokens is None:
        return whole
    # Timed against the whole head in turns: the share is steadier than either time.
    vocab = parcel.plan.fingerprint.vocab_size
    ranking = torch.cat([tokens, torch.arange(vocab)[~torch.isin(torch.arange(vocab), tokens)]])
    took = measure_heads(stack, ranking, [(vocab, precision), (len(tokens), precision)])
    share = took[len(tokens), precision] / took[vocab, precision]
    return [share * ms for ms in whole]


def _priced(plan: SkipPlan, costs: Costs, rates: list[float]) -> SkipPlan:
    """`plan` with `costs` and all that a plan derives from them; what was measured on an engine elsewhere is dropped."""
    view, tokens = plan.view.branches, _tokens(rates)
    lengths = range(1, len(rates) + 1)
    if plan.draft_tokens_by_batch:
        best = max(lengths, key=lambda k: costs.speedup(view, k, tokens[k]))
        table = lengths_by_batch(view, tokens[: best + 1], costs)
    else:  # the user fixed the length
        best, table = min(plan.num_speculative_tokens, len(rates)), []
    speedup = costs.speedup(view, best, tokens[best])
    return plan.model_copy(
        update={
            "num_speculative_tokens": best,
            "draft_tokens_by_batch": table,
            "worthwhile": speedup > WORTHWHILE,
            "prediction": Prediction(
                acceptance_rate=(tokens[best] - 1.0) / best,
                mean_accepted_length=tokens[best],
                speedup=speedup,
            ),
            "curve": [_repriced(point, costs) for point in plan.curve],
            "costs": costs,
            "check": None,
            "windows": [],
        }
    )


def _tokens(rates: list[float]) -> list[float]:
    """Tokens that a round of k drafts yields, by k from 0."""
    return [1.0, *(1.0 + total for total in accumulate(accumulate(rates, mul)))]


def _repriced(point: Candidate, costs: Costs) -> Candidate:
    """A point of the curve at other costs; one at a precision that there is no kernel for here gives nothing."""
    used = {*point.attention, *point.mlp} - {"skip"}
    if not used <= set(costs.precisions):
        return point.model_copy(update={"speedup": [1.0] + [0.0] * len(point.acceptance)})
    tokens = _tokens(point.acceptance)
    return point.model_copy(
        update={
            "speedup": [costs.speedup(point.view, k, tokens[k]) if k else 1.0 for k in range(len(tokens))]
        }
    )

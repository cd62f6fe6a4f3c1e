"""A plan for people: summary, tables and picture."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.keep import KeepSet
from sdfp_vllm.plan import Candidate, CostModel, SkipPlan, default_plan_dir

_COLOURS = ("lightgrey", "palegreen", "tab:green")  # by the number of a layer's branches that are kept


def serve_command(plan: SkipPlan, folder: Path) -> str:
    """The command that serves the model with this plan, found by itself where it lies in the default place."""
    if folder.resolve() == default_plan_dir(plan.fingerprint).resolve():
        return f"vllm serve {plan.model} --speculative-model sdfp"
    return f'vllm serve {plan.model} --speculative-config \'{{"method": "sdfp", "model": "{folder}"}}\''


def best_draft_tokens(candidate: Candidate) -> int:
    """The draft length (at least 1) at which a keep set is predicted to be fastest."""
    return max(range(1, len(candidate.speedup)), key=candidate.speedup.__getitem__)


def verdict(plan: SkipPlan) -> str:
    """One sentence: what the plan does, and whether it pays."""
    p = plan.prediction
    what = (
        f"{parts(plan)} of {plan.fingerprint.num_layers} layers draft {plan.num_speculative_tokens} tokens a round: "
        f"{p.acceptance_rate:.0%} of them accepted, {p.mean_accepted_length:.2f} tokens a round, "
        f"{p.speedup:.2f}x plain decoding predicted at batch 1"
    )
    if plan.worthwhile:
        return what + "."
    return (
        f"Nothing beats plain decoding on this machine; serve the model without SDFP. The best found: {what}."
    )


def parts(keeps: SkipPlan | Candidate) -> str:
    """How much is kept: layers, and where there are any, single branches of others."""
    counts = [(len(keeps.kept_attention), "attention"), (len(keeps.kept_mlp), "MLP")]
    return " + ".join([str(len(keeps.kept_layers)), *(f"{n} {name}" for n, name in counts if n)])


def summary(plan: SkipPlan, path: Path) -> Text:
    """What `sdfp plan` prints at its end."""
    lines = Text()
    lines.append(verdict(plan) + "\n", style="green" if plan.worthwhile else "yellow")
    lines.append(f"Kept layers: {plan.keep}\n")
    if text := bridges(plan):
        lines.append(f"Bridges: {text}\n")
    if text := head(plan):
        lines.append(f"Draft head: {text}\n")
    lines.append(f"Plan: {path}\n")
    lines.append(f"{'Serve it' if plan.worthwhile else 'Serve it all the same'}: ")
    lines.append(serve_command(plan, path.parent), style="bold")
    return lines


def bridges(plan: SkipPlan) -> str:
    """Kind, rank and runs of the plan's bridges, each with the error it leaves; empty for none."""
    if plan.bridges == "none":
        return ""
    rank = f" of rank {plan.bridges.rank}" if plan.bridges.rank else ""
    runs = ", ".join(f"{r.first}-{r.last} ({r.error:.2f})" for r in plan.bridges.runs)
    return f"{plan.bridges.kind}{rank} over layers (held-out error left): {runs}"


def head(plan: SkipPlan) -> str:
    """Size of a restricted draft head and what it covers; empty for the full one."""
    if plan.head == "full":
        return ""
    vocab = plan.fingerprint.vocab_size
    return f"{plan.head.tokens:,} of {vocab:,} tokens, {plan.head.coverage:.1%} of those in the target's own text"


def tables(plan: SkipPlan) -> Group:
    """What `sdfp show` prints."""
    return Group(
        f"{plan.model} ({plan.fingerprint.architecture}, {plan.fingerprint.num_layers} layers)",
        verdict(plan),
        layer_table(plan),
        curve_table(plan),
        detail_table(plan),
    )


def layer_table(plan: SkipPlan) -> Table:
    """Scores per layer, in the form that the plan was ranked by."""
    name = score_name(plan)
    table = Table(
        "layer", "kept", "attention", "MLP", "total", "", title=f"FIT scores ({name.replace('_', ' ')})"
    )
    top = max((getattr(s.total, name) for s in plan.scores), default=0.0)
    for s in plan.scores:
        values = [getattr(part, name) for part in (s.attention, s.mlp, s.total)]
        bar = "█" * math.ceil(20 * values[2] / top) if top else ""
        mark = kept_mark(plan.keep, s.layer)
        style = "green" if mark else "dim"
        table.add_row(
            str(s.layer), "●" if mark == "kept" else mark, *(f"{v:.3g}" for v in values), bar, style=style
        )
    return table


def kept_mark(keep: KeepSet, layer: int) -> str:
    """What of a layer is kept: "kept", "attention", "MLP", or nothing."""
    branches = keep.branches(layer)
    if len(branches) == 2:
        return "kept"
    return "attention" if "attention" in branches else "MLP" if branches else ""


def curve_table(plan: SkipPlan) -> Table:
    """The searched keep sets, each at its best draft length."""
    table = Table("layers kept", "tokens a round", "acceptance by token", "predicted speedup", title="Search")
    for c in plan.curve:
        k = best_draft_tokens(c)
        chosen = c.keep == plan.keep
        table.add_row(
            parts(c),
            str(plan.num_speculative_tokens if chosen else k),
            " ".join(f"{a:.2f}" for a in c.acceptance),
            f"{plan.prediction.speedup if chosen else c.speedup[k]:.2f}x",
            style="green" if chosen else "",
        )
    return table


def detail_table(plan: SkipPlan) -> Table:
    """Costs and provenance."""
    table = Table(show_header=False, title="How it was made")
    for name, value in details(plan):
        table.add_row(name, value)
    return table


def details(plan: SkipPlan) -> list[tuple[str, str]]:
    """(name, value) rows on costs and provenance."""
    made, cost = plan.made, plan.cost
    rows = [
        ("calibration", made.calibration),
        ("calibration tokens", str(made.calibration_tokens)),
        ("selector", f"{made.selector}, seed {made.seed}"),
        ("made", f"{made.created}, sdfp-vllm {made.sdfp_version} {(made.git_sha or '')[:12]}".rstrip()),
        ("with", f"torch {made.torch_version}, transformers {made.transformers_version}"),
    ]
    if plan.draft_tokens_by_batch:
        rows.append(("draft tokens by batch", ", ".join(f"{b}: {k}" for b, k in plan.draft_tokens_by_batch)))
    if text := bridges(plan):
        rows.append(("bridges", text))
    if text := head(plan):
        rows.append(("draft head", text))
    if cost:
        branch_costs = []
        if cost.attention_ms is not None and cost.mlp_ms is not None:
            branch_costs = [
                ("of a layer: attention, MLP", f"{cost.attention_ms:.3f} ms, {cost.mlp_ms:.3f} ms")
            ]
        relative = " ".join(f"{v / cost.verify_ms[0]:.2f}" for v in cost.verify_ms)
        rows += [
            ("measured on", f"{cost.device}, {cost.dtype}, {cost.threads} threads"),
            ("layer, head", f"{cost.layer_ms:.3f} ms, {cost.head_ms:.3f} ms" + _draft_head_ms(cost)),
            *branch_costs,
            ("verification, 1 row", f"{cost.verify_ms[0]:.2f} ms"),
            ("verification, rows over 1", relative),
        ]
    return rows


def _draft_head_ms(cost: CostModel) -> str:
    return "" if cost.draft_head_ms is None else f", of the draft {cost.draft_head_ms:.3f} ms"


def score_name(plan: SkipPlan) -> str:
    return "diagonal_score" if plan.made.selector.endswith("diagonal") else "trace_score"


def draw_png(plan: SkipPlan, path: Path) -> None:
    """Draws scores and curve with matplotlib.

    Raises:
        SdfpError: If matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise SdfpError(
            "--png",
            "needs matplotlib",
            "Run `pip install 'sdfp-vllm[plot]'`, or draw with --html, which needs nothing.",
        ) from e
    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    name = score_name(plan)
    attention = [getattr(s.attention, name) for s in plan.scores]
    total = [getattr(s.total, name) for s in plan.scores]
    numbers = [s.layer for s in plan.scores]
    colours = [_COLOURS[len(plan.keep.branches(i))] for i in numbers]
    left.bar(numbers, total, color=colours, edgecolor="dimgrey", linewidth=0.5)
    left.plot(numbers, attention, "k_", label="of attention alone")
    if any(v > 0 for v in total):
        left.set_yscale("log")
    left.set(
        title="FIT score by layer (green: kept, pale: one branch)",
        xlabel="layer",
        ylabel=name.replace("_", " "),
    )
    left.legend()
    for k in range(1, max((len(c.speedup) for c in plan.curve), default=1)):
        points = sorted((c.keep.size, c.speedup[k]) for c in plan.curve if k < len(c.speedup))
        right.plot(*zip(*points, strict=True), "o-", markersize=3, label=f"{k}")
    right.axhline(1.0, color="dimgrey", linestyle="--")
    right.plot(plan.keep.size, plan.prediction.speedup, "*", color="tab:red", markersize=14)
    right.set(
        title="Predicted speedup at batch 1 (star: the plan)",
        xlabel="layers kept (a branch counts half)",
        ylabel="over plain decoding",
    )
    right.legend(title="tokens a round")
    write_drawing(path, lambda: figure.savefig(path, dpi=130, format="png"), "--png")


def write_drawing(path: Path, write, flag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as e:
        raise SdfpError(
            f"{flag} {path}", f"cannot be written ({e.strerror or e})", "Choose another file."
        ) from e

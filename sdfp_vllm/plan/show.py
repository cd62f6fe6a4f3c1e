"""A plan for people: summary, tables and picture."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.schema import Candidate, SkipPlan, StoredView
from sdfp_vllm.plan.store import is_default_plan_dir
from sdfp_vllm.plan.view import DraftView

_COLOURS = ("lightgrey", "palegreen", "tab:green")  # by the number of a layer's branches that are kept


def serve_command(plan: SkipPlan, folder: Path) -> str:
    """The command that serves the model with this plan, found by itself where it lies in the default place."""
    settings = ""
    if plan.costs:  # the dtype that it was planned in, and how the engine ran
        settings += f" --dtype {plan.costs.dtype}"
        settings += " --enforce-eager" if plan.costs.engine == "eager" else ""
    if is_default_plan_dir(folder, plan.fingerprint):
        return f"vllm serve {plan.model_argument}{settings} --speculative-model sdfp"
    return f'vllm serve {plan.model_argument}{settings} --speculative-config \'{{"method": "sdfp", "model": "{folder}"}}\''


def best_draft_tokens(candidate: Candidate) -> int:
    """The draft length (at least 1) at which a keep set is predicted to be fastest."""
    return max(range(1, len(candidate.speedup)), key=candidate.speedup.__getitem__)


def verdict(plan: SkipPlan) -> str:
    """One sentence: what the plan does, and whether it pays."""
    p = plan.prediction
    what = (
        f"{parts(plan.view)} of {plan.fingerprint.num_layers} layers draft {plan.num_speculative_tokens} tokens a round: "
        f"{p.acceptance_rate:.0%} of them accepted, {p.mean_accepted_length:.2f} tokens a round, "
        f"{p.speedup:.2f}x plain decoding predicted at batch 1"
    )
    if plan.check:
        what += f", {plan.check.drafted / plan.check.plain:.2f}x measured"
    if plan.worthwhile:
        return what + "."
    return (
        f"Nothing beats plain decoding on this machine; serve the model without SDFP. The best found: {what}."
    )


def parts(view: StoredView | Candidate) -> str:
    """How much is kept, at which precisions: layers, and where there are any, single branches of others."""
    seen = DraftView.from_modes(view.attention, view.mlp)
    counts = [(len(seen.attention), "attention"), (len(seen.mlp), "MLP")]
    kept = " + ".join([str(len(seen.layers)), *(f"{n} {name}" for n, name in counts if n)])
    used = Counter(seen.precision(i, b) for b, i in seen.units())
    return (
        kept
        if set(used) == {"full"}
        else f"{kept} ({', '.join(f'{n} branches {p}' for p, n in used.most_common())})"
    )


def summary(plan: SkipPlan, path: Path) -> Text:
    """What `sdfp plan` prints at its end."""
    lines = Text()
    lines.append(verdict(plan) + "\n", style="green" if plan.worthwhile else "yellow")
    lines.append(f"Kept layers: {plan.view.branches}\n")
    for name, text in (
        ("Bridges", bridges(plan)),
        ("Draft head", head(plan)),
        ("Attention", window(plan)),
        ("Extra weights", memory(plan)),
    ):
        if text:
            lines.append(f"{name}: {text}\n")
    for line in check(plan):
        lines.append(line + "\n")
    lines.append(f"Plan: {path}\n")
    lines.append(f"{'Serve it' if plan.worthwhile else 'Serve it all the same'}: ")
    lines.append(serve_command(plan, path.parent), style="bold")
    return lines


def memory(plan: SkipPlan) -> str:
    """What rounded copies and head rows take beside the model; empty for nothing."""
    return f"{plan.extra_bytes / 1e6:.0f} MB" if plan.extra_bytes else ""


def check(plan: SkipPlan) -> list[str]:
    """What the engine gave, line by line; where nothing was run, that."""
    c = plan.check
    if c is None:
        return ["Not checked on an engine: `sdfp plan` does that at its end, without --no-check."]
    dtype = plan.costs.dtype if plan.costs else ""
    lines = [
        f"Measured ({c.engine} engine, {c.prompts} prompts, batch 1, {dtype}): plain {c.plain:.1f} tokens/s, drafts "
        f"{c.drafted:.1f} ({c.drafted / c.plain:.2f}x, {c.acceptance_rate:.0%} accepted), with copies {c.copies:.1f} "
        f"({c.copies / c.plain:.2f}x); {c.identical} of {c.prompts} texts identical"
    ]
    if c.other is not None:
        lines.append(f"Plain in {c.other_dtype}, the checkpoint's own dtype: {c.other:.1f} tokens/s")
        if c.other > max(c.drafted, c.copies):
            lines.append(f"That is faster than drafts in {dtype}: serve in {c.other_dtype} without SDFP.")
    return lines


def bridges(plan: SkipPlan) -> str:
    """Kind, rank and runs of the plan's bridges, each with the error it leaves; empty for none."""
    made = plan.view.bridges
    if made is None:
        return ""
    rank = f" of rank {made.rank}" if made.rank else ""
    runs = ", ".join(f"{r.first}-{r.last} ({r.error:.2f})" for r in made.runs)
    return f"{made.kind}{rank} over layers (held-out error left): {runs}"


def head(plan: SkipPlan) -> str:
    """Size and precision of the draft's head and what it covers; empty for the target's own."""
    made, vocab = plan.view.head, plan.fingerprint.vocab_size
    if made.tokens is None:
        return f"all tokens, in {made.precision}" if made.precision != "full" else ""
    size = f"{made.tokens:,} of {vocab:,} tokens, {made.coverage:.1%} of those in the target's own text"
    return size if made.precision == "full" else f"{size}, in {made.precision}"


def window(plan: SkipPlan) -> str:
    """How much of a long context drafts attend to; empty for all of it."""
    return f"to {plan.view.window}, by whole blocks" if plan.view.window else ""


def windows(plan: SkipPlan) -> list[str]:
    """What was tried of how much drafts see of a long context, a line for each of its lengths."""
    lines: dict[int, list[str]] = {}
    for t in plan.windows:
        seen = "all" if t.last is None else f"last {t.last:,}"
        lines.setdefault(t.context, []).append(
            f"{seen} {t.tokens_per_second:.1f} tokens/s ({t.acceptance_rate:.0%} accepted)"
        )
    return [f"{context:,} tokens: {', '.join(tried)}" for context, tried in lines.items()]


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
        mark = kept_mark(plan.view.branches, s.layer)
        style = "green" if mark else "dim"
        table.add_row(
            str(s.layer), mark.replace("kept", "●"), *(f"{v:.3g}" for v in values), bar, style=style
        )
    return table


def kept_mark(view: DraftView, layer: int) -> str:
    """What of a layer is kept: "kept", "attention", "MLP", or nothing; with the precision where it is not full."""
    branches = view.branches(layer)
    if not branches:
        return ""
    named = "kept" if len(branches) == 2 else "attention" if "attention" in branches else "MLP"
    used = sorted({view.precision(layer, b) for b in branches} - {"full"})
    return f"{named} {'/'.join(used)}" if used else named


def curve_table(plan: SkipPlan) -> Table:
    """The searched keep sets, each at its best draft length."""
    table = Table("layers kept", "tokens a round", "acceptance by token", "predicted speedup", title="Search")
    for c in plan.curve:
        k = best_draft_tokens(c)
        chosen = c.view == plan.view.branches
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
    made, costs = plan.made, plan.costs
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
    if text := window(plan):
        rows.append(("attention of drafts", text))
    rows += [("drafts in long contexts", line) for line in windows(plan)]
    if text := memory(plan):
        rows.append(("extra weights", text))
    rows += [("check", line) for line in check(plan)]
    if costs:
        verify = [costs.target_ms(m) for m in range(1, 10)]
        layers = [
            f"{p}: {a[0]:.3f} + {costs.mlp[p][0]:.3f} ms"
            for p, a in costs.attention.items()
            if p in costs.mlp
        ]
        heads = [f"{p}: {h[0]:.3f} ms" for p, h in costs.head.items()]
        if costs.draft_head:
            heads.append(f"the draft's: {costs.draft_head[0]:.3f} ms")
        engine = f" ({costs.engine})" if costs.engine else ""
        rows += [
            ("measured on", f"{costs.device}, {costs.dtype}, {costs.threads} threads"),
            ("a layer: attention + MLP", ", ".join(layers)),
            ("head", ", ".join(heads)),
            (
                "the engine adds" + engine,
                f"{costs.layer_overhead_ms:.3f} ms a layer, {costs.draft_added_ms:.3f} ms in a draft",
            ),
            ("verification, 1 row", f"{verify[0]:.2f} ms"),
            ("verification, rows over 1", " ".join(f"{v / verify[0]:.2f}" for v in verify)),
        ]
    return rows


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

"""The suite's results as a page of tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.toy.engines import DRAFT_MODEL, FIXED, NGRAM, PLAIN, SDFP, SUFFIX

Rows = Sequence[dict[str, Any]]
_COLOURS = {
    PLAIN: "0.6", SDFP: "tab:blue", FIXED: "tab:cyan", DRAFT_MODEL: "tab:orange", NGRAM: "tab:green",
    SUFFIX: "tab:red",
}  # fmt: skip


def tables(result: dict[str, Any]) -> str:
    """Markdown: the headline, then a table for each model."""
    lines = ["| headline (demo target) | |", "|---|---|"]
    lines += [f"| {name} | {_number(value, '.2f')} |" for name, value in result["headline"].items()]
    for model, rows in result["models"].items():
        lines += ["", f"**{model}**", "", result["notes"][model], "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Rows) -> list[str]:
    methods = [m for m in dict.fromkeys(r["method"] for r in rows) if m != PLAIN]
    lines = [
        f"| prompts | batch | {' | '.join(methods)} | SDFP: acceptance | tokens a round | draft share | bound "
        "| efficiency |",
        "|---" * (2 + len(methods) + 5) + "|",
    ]
    for cell in dict.fromkeys((r["kind"], r["batch"], r["temperature"]) for r in rows):
        here = {r["method"]: r for r in rows if (r["kind"], r["batch"], r["temperature"]) == cell}
        kind = f"{cell[0]}, T = {cell[2]}" if cell[2] else cell[0]
        ours = here[SDFP]
        best = max(here[m]["ratio"] for m in methods if m in here)
        shown = [_ratio(here[m], best) if m in here else "-" for m in methods]
        lines.append(
            f"| {kind} | {cell[1]} | {' | '.join(shown)} | {_number(ours['acceptance_rate'], '.2f')} "
            f"| {_number(ours['tokens_per_round'], '.2f')} | {ours['draft_share']:.0%} "
            f"| {_number(ours['bound'], '.2f')} | {_number(ours['efficiency'], '.2f')} |"
        )
    return lines


def _ratio(row: dict[str, Any], best: float) -> str:
    mark = "**" if row["ratio"] == best else ""
    spread = f" ({row['ratio_least']:.2f}-{row['ratio_most']:.2f})" if row["repeats"] > 1 else ""
    return f"{mark}{row['ratio']:.2f}{mark}{spread}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def picture(result: dict[str, Any], path: Path) -> None:
    """Ratio to plain decoding over the batch size, a panel for each model and kind of prompt; none with one batch size."""
    from matplotlib.figure import Figure

    panels = [
        (model, kind, [r for r in rows if r["kind"] == kind and not r["temperature"]])
        for model, rows in result["models"].items()
        for kind in dict.fromkeys(r["kind"] for r in rows)
        if len({r["batch"] for r in rows if r["kind"] == kind}) > 1
    ]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (model, kind, rows) in zip(axes, panels, strict=True):
        for method in dict.fromkeys(r["method"] for r in rows):
            if method == PLAIN:
                continue
            mine = [r for r in rows if r["method"] == method]
            batches = [r["batch"] for r in mine]
            axis.plot(batches, [r["ratio"] for r in mine], "o-", color=_COLOURS[method], label=method)
            axis.fill_between(
                batches,
                [r["ratio_least"] for r in mine],
                [r["ratio_most"] for r in mine],
                color=_COLOURS[method],
                alpha=0.15,
            )
        axis.axhline(1.0, color="0.6", linewidth=1)
        axis.set(xscale="log", xlabel="batch size", title=f"{model}\n{kind}")
        axis.set_xticks(sorted({r["batch"] for r in rows}), sorted({str(r["batch"]) for r in rows}, key=int))
        axis.minorticks_off()
        axis.title.set_fontsize(9)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("decoding speed over plain vLLM's")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)

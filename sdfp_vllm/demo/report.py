"""What the demo prints: the table, the same by kind of question, the plan's promise beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sdfp_vllm.demo.methods import ALONE, DRAFT_MODEL, NGRAM, OWN_DTYPE, PLAIN, SDFP, SUFFIX
from sdfp_vllm.plan.schema import SkipPlan

NAMES = {
    PLAIN: "plain vLLM",
    OWN_DTYPE: "plain vLLM, the checkpoint's dtype",
    ALONE: "SDFP, the model's drafts alone",
    SDFP: "SDFP as it comes, with copies",
    NGRAM: "vLLM ngram",
    SUFFIX: "vLLM suffix",
    DRAFT_MODEL: "vLLM draft_model",
}


def print_rows(console: Console, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints one line for each method."""
    table = Table(title=title, title_justify="left")
    for heading in ("method", "tokens/s", "ratio", "least-most", "accepted", "tokens/round", "extra memory", "same text"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for r in rows:
        table.add_row(
            NAMES.get(r["method"], r["method"]),
            f"{r['tokens_per_second']:.1f}",
            f"{r['ratio']:.2f}x",
            f"{r['ratio_least']:.2f}-{r['ratio_most']:.2f}",
            _share(r["acceptance_rate"]),
            "-" if r["tokens_per_round"] is None else f"{r['tokens_per_round']:.2f}",
            f"{r['extra_bytes'] / 1e6:.0f} MB",
            f"{r['identical_texts']} of {r['texts']}",
        )
    console.print(table)


def print_kinds(console: Console, kinds: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Prints ratios by kind of question, and what SDFP's drafts were accepted at."""
    if len(kinds) < 2:
        return
    methods = [r["method"] for r in next(iter(kinds.values())) if r["method"] != PLAIN]
    table = Table(title="Ratio to plain vLLM by kind of question (SDFP: share of drafts accepted)", title_justify="left")  # fmt: skip
    table.add_column("kind")
    for method in methods:
        table.add_column(method, justify="right")
    for kind, rows in kinds.items():
        cells = []
        for r in rows:
            if r["method"] == PLAIN:
                continue
            accepted = f" ({_share(r['acceptance_rate'])})" if r["method"] in (ALONE, SDFP) else ""
            cells.append(f"{r['ratio']:.2f}x{accepted}")
        table.add_row(kind, *cells)
    console.print(table)


def print_promise(console: Console, plan: SkipPlan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what the plan promised for its fixed length beside what drafts of the model alone gave."""
    alone = next((r for r in rows if r["method"] == ALONE), None)
    if alone is None or alone["acceptance_rate"] is None:
        console.print("SDFP drafted nothing: the plan expects no gain on this machine.")
        return
    p = plan.prediction
    console.print(
        f"Planned: {p.speedup:.2f}x at {p.acceptance_rate:.1%} accepted. Measured, drafts of the model alone: "
        f"{alone['ratio']:.2f}x at {alone['acceptance_rate']:.1%}."
    )
    own = next((r for r in rows if r["method"] == OWN_DTYPE), None)
    ours = max((r for r in rows if r["method"] in (ALONE, SDFP)), key=lambda r: r["ratio"])
    if own and own["ratio"] > ours["ratio"]:
        console.print(
            f"Plain vLLM in the checkpoint's dtype is faster here ({own['ratio']:.2f}x): serve that.", style="yellow"
        )  # fmt: skip


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

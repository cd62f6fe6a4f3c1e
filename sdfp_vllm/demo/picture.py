"""The demo's picture: tokens/s per method, and ratios by kind of question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdfp_vllm.demo.methods import ALONE, DRAFT_MODEL, NGRAM, OWN_DTYPE, PLAIN, SDFP, SUFFIX

_COLOURS = {
    PLAIN: "0.6", OWN_DTYPE: "0.4", ALONE: "tab:cyan", SDFP: "tab:blue", NGRAM: "tab:green", SUFFIX: "tab:olive",
    DRAFT_MODEL: "tab:orange",
}  # fmt: skip


def save(
    path: Path,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    kinds: Mapping[str, Sequence[Mapping[str, Any]]],
) -> bool:
    """Draws both; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    speed, kind_axes = figure.subplots(1, 2, width_ratios=(2, 3))
    figure.suptitle(title, fontsize=11)
    bars = speed.bar(
        [r["method"].replace(", ", ",\n") for r in rows],
        [r["tokens_per_second"] for r in rows],
        color=[_COLOURS.get(r["method"], "0.8") for r in rows],
    )
    speed.bar_label(bars, [f"{r['ratio']:.2f}x" for r in rows])
    speed.set_ylabel("tokens/s, decoding alone")
    speed.margins(y=0.15)
    speed.tick_params(axis="x", labelsize=7)
    methods = [r["method"] for r in rows if r["method"] != PLAIN]
    width = 0.8 / max(1, len(methods))
    for i, method in enumerate(methods):
        ratios = [next(r["ratio"] for r in of_kind if r["method"] == method) for of_kind in kinds.values()]
        kind_axes.bar(
            [k + (i + 0.5) * width - 0.4 for k in range(len(kinds))], ratios, width,
            color=_COLOURS.get(method, "0.8"), label=method,
        )  # fmt: skip
    kind_axes.axhline(1, color="0.3", linewidth=0.8)
    kind_axes.set_xticks(range(len(kinds)), [k.replace(" ", "\n") for k in kinds], fontsize=8)
    kind_axes.set_ylabel("ratio to plain vLLM")
    kind_axes.legend(fontsize=7, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True

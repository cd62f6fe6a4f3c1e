"""From runs under load to ratios, a verdict on whether they may be claimed, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

PLAIN = "vLLM without the plugin"


def rows_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each server and load: its repeats' ratios to plain vLLM's of the same repeat, their mean and their spread.

    A ratio's spread is the largest over the smallest of its repeats. `tokens` is above 1 where a server is faster,
    `tpot` and `p99` below.
    """
    plain = {(r["load"], r["repeat"]): r for r in runs if r["server"] == PLAIN}
    rows = []
    for server in dict.fromkeys(r["server"] for r in runs):
        for load in dict.fromkeys(r["load"] for r in runs):
            own = [r for r in runs if r["server"] == server and r["load"] == load]
            against = [plain[load, r["repeat"]] for r in own]
            row: dict[str, Any] = {"server": server, "load": load}
            for name, key in (
                ("tokens", "output_throughput"),
                ("tpot", "mean_tpot_ms"),
                ("p99", "p99_tpot_ms"),
            ):
                ratios = [r[key] / p[key] for r, p in zip(own, against, strict=True)]
                row[name] = round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3)
                row[f"{name}_spread"] = round(max(ratios) / min(ratios), 3)
            for key in ("output_throughput", "mean_tpot_ms", "p99_tpot_ms", "median_ttft_ms", "p99_e2el_ms"):
                row[key] = round(sum(r[key] for r in own) / len(own), 2)
            drafted = sum(r["num_draft_tokens"] for r in own)
            row["acceptance"] = (
                round(sum(r["num_accepted_tokens"] for r in own) / drafted, 3) if drafted else None
            )
            row["drafted"] = int(drafted)
            rows.append(row)
    return rows


def problems(content: dict[str, Any]) -> list[str]:
    """Why a run's figures may not be compared; empty where they may.

    Servers must differ in how they decode alone, answer equally long (greedy, float32: the same tokens), and no prompt
    may come twice: a method that remembers answers would find its own.
    """
    found = []
    common = {s["name"]: (s["settings"], s["environment"]) for s in content["servers"]}
    if len(set(map(str, common.values()))) > 1:
        found.append("the servers have different settings beside --speculative-config")
    prompts = [h for load in content["loads"] for h in load["prompts"]]
    if len(set(prompts)) < len(prompts):
        found.append(f"{len(prompts) - len(set(prompts))} prompts come twice")
    lengths: dict[tuple[str, int], set[int]] = {}
    for run in content["runs"]:
        lengths.setdefault((run["load"], run["repeat"]), set()).add(run["total_output_tokens"])
    found += [
        f"at load {load}, repeat {n}, answers differ in length: {sorted(seen)} tokens"
        for (load, n), seen in lengths.items()
        if len(seen) > 1
    ]
    if any(r["repeat"] > 0 for r in content["runs"]) is False:
        found.append("one repeat has no spread: nothing can be claimed")
    return found


def claimed(ratio: float, spread: float) -> str:
    """A ratio as it may be told: as about 1 where its repeats differ by more than it differs from 1."""
    return f"{ratio:.2f}x" if abs(math.log(ratio)) > math.log(spread) else f"~1 ({ratio:.2f})"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratios to plain vLLM, with milliseconds beside them."""
    out = Table("load", "server", "tokens/s", "ratio", "TPOT ms", "ratio", "p99 TPOT ms", "ratio", "accepted")
    for row in sorted(rows, key=lambda r: list(dict.fromkeys(x["load"] for x in rows)).index(r["load"])):
        cells = [row["load"], row["server"]]
        for value, name in (
            ("output_throughput", "tokens"),
            ("mean_tpot_ms", "tpot"),
            ("p99_tpot_ms", "p99"),
        ):
            cells += [f"{row[value]:.1f}", claimed(row[name], row[f"{name}_spread"])]
        cells.append("-" if row["acceptance"] is None else f"{row['acceptance']:.2f} of {row['drafted']}")
        out.add_row(*cells)
    return out


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """All requests' tokens a second over one request's, a line a server, a point a concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for server in dict.fromkeys(r["server"] for r in rows):
        own = [r for r in rows if r["server"] == server]
        x, y = [1e3 / r["mean_tpot_ms"] for r in own], [r["output_throughput"] for r in own]
        axes.plot(x, y, marker="o", label=server)
        for r, a, b in zip(own, x, y, strict=True):
            axes.annotate(r["load"], (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("tokens/s of one request (1 / mean TPOT)")
    axes.set_ylabel("tokens/s of the server")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)

"""Rows of a run: a method, a batch size and a temperature each, and for the batch of one each kind of question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from sdfp_vllm.demo.figures import Pair, row
from sdfp_vllm.demo.methods import ALONE, SDFP
from sdfp_vllm.measure.spec import EngineSpec, Measurement
from sdfp_vllm.plan.schema import SkipPlan

Runs = Mapping[str, list[tuple[Measurement, Measurement]]]  # by method: its run, and plain vLLM's beside it


def rows_of(specs: Mapping[str, EngineSpec], runs: Runs, plan: SkipPlan) -> list[dict[str, Any]]:
    """One row for each method, batch size and temperature; plain vLLM's repeats in other groups are pooled."""
    rows = []
    for name, asked, pairs in _methods(specs, runs):
        for batch, temperature in dict.fromkeys(asked):
            own = [p for key, p in zip(asked, pairs, strict=True) if key == (batch, temperature)]
            made = row(name, own, plan.pacing if name in (ALONE, SDFP) else None)
            if temperature:
                made["identical_texts"] = None
            rows.append(made | {"batch": batch, "temperature": temperature})
    return rows


def kinds_of(
    specs: Mapping[str, EngineSpec], runs: Runs, kinds: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Greedy, one at a time: a row for each method and kind of question, in the order of `kinds`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, asked, pairs in _methods(specs, runs):
        singles = [p for key, p in zip(asked, pairs, strict=True) if key == (1, 0.0)]
        if not singles:
            continue
        first = kinds[
            : len(singles) // len(runs[SDFP if name == ALONE else name])
        ]  # those asked one at a time
        for kind in dict.fromkeys(first):
            own = [p for i, p in enumerate(singles) if first[i % len(first)] == kind]
            found.setdefault(kind, []).append(row(name, own))
    return found


def _methods(
    specs: Mapping[str, EngineSpec], runs: Runs
) -> Iterator[tuple[str, list[tuple[int, float]], list[Pair]]]:
    """(name, batch and temperature of each turn, each turn with plain vLLM's); SDFP's turns alternate."""
    for method, both in runs.items():
        variants = [(ALONE, 0, 2), (SDFP, 1, 2)] if method == SDFP else [(method, 0, 1)]
        for name, start, step in variants:
            turns = specs[method].turns[start::step]
            pairs = [
                (ours.turns[start + step * i], plain.turns[i])
                for ours, plain in both
                for i in range(len(turns))
            ]
            yield name, [(t.batch, t.temperature) for t in turns] * len(both), pairs


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """For the terminal."""
    headings = ("method", "batch", "T", "tokens/s", "ratio", "least-most", "accepted", "a round", "efficiency", "identical")  # fmt: skip
    made = Table(*headings)
    for r in rows:
        made.add_row(
            r["method"],
            str(r["batch"]),
            f"{r['temperature']:g}",
            f"{r['tokens_per_second']:.2f}",
            f"{r['ratio']:.2f}x",
            f"{r['ratio_least']:.2f}-{r['ratio_most']:.2f}",
            "-" if r["acceptance_rate"] is None else f"{r['acceptance_rate']:.3f}",
            "-" if r["tokens_per_round"] is None else f"{r['tokens_per_round']:.2f}",
            "-" if r["efficiency"] is None else f"{r['efficiency']:.2f}",
            "-" if r["identical_texts"] is None else f"{r['identical_texts']} of {r['texts']}",
        )
    return made

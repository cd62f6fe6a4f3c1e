"""What does dropping layers of a real model cost in acceptance, by who chooses them, at full precision and in int8?

    sdfp plan MODEL --dtype float32 -o PLAN
    python -m benchmarks.studies.layers_dropped MODEL --plan PLAN [--dropped 1 2 4 8] [--out FILE]

Methods choose what to drop, in whole layers' worth of weights: FIT's trace on the standard library's sources ("corpus") or on
the text that the target writes in chats with itself ("own text"), uniform spacing, SWIFT's search (its public code's, on this
package's forward; see benchmarks/studies/compare_selectors.py), greedy removal by the overlap of the draft's first step with the
target, and this package's local search ("auto"). Each keep set is judged on chats that no method saw, four drafts a round: the
share accepted as it is, with every kept linear in int8, and at full precision with bridges (affine, rank 64) in the place of
dropped whole layers. Speeds are predicted from PLAN's costs, which hold the engine's overheads on this machine.
"""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.studies.compare_selectors import Bench
from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.machine import processor
from sdfp_vllm.common.provenance import weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.fingerprint import resolve_model_dir
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.plan.view import DraftView
from sdfp_vllm.planner.bridges import BridgeFitter
from sdfp_vllm.planner.fisher import fisher_scores
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.search import ranked_layers
from sdfp_vllm.planner.stack import DecoderStack, load_target
from sdfp_vllm.planner.texts import Texts, own_windows

DRAFT_TOKENS = 4
METHODS = ("FIT, corpus", "FIT, own text", "uniform", "SWIFT's search", "greedy removal", "auto")
BRIDGES = {"affine": ("affine", 0), "rank 64": ("low-rank", 64)}


class RealBench(Bench):
    """compare_selectors' methods on a real model: chats for texts, a plan's costs, two texts for FIT."""

    def __init__(self, folder: Path, plan: Path, console: Console):
        o = PlanOptions(text_sequences=36)
        texts = Texts.read(o, load_tokenizer(folder))
        self.stack = DecoderStack(load_target(folder, torch.float32))
        self.n, self.dv_tries = self.stack.num_layers, 0
        with console.status("The target writes"):
            text = greedy_continuations(self.stack, texts.ask(self.stack)[: 3 * 12], o.new_tokens)
        judging, rest = text.split(12)
        assert rest is not None
        held, test = rest.split(12)
        assert test is not None
        self.held_text = held
        self.judging, self.held, self.test = (DraftRollout(self.stack, t) for t in (judging, held, test))
        costs = load_plan(plan).costs
        assert costs is not None, "this plan was made by hand"
        self.costs = costs
        # Methods choose at full precision.
        full = {name: {"full": getattr(costs, name)["full"]} for name in ("attention", "mlp", "head")}
        self.cost = costs.model_copy(update=full | {"draft_head": None})
        began = time.process_time()
        with console.status("Fisher traces"):
            self.own = fisher_scores(self.stack, own_windows(judging, 8))
            self.corpus = fisher_scores(self.stack, texts.corpus())
        self.fisher_seconds = (time.process_time() - began) / 2
        self.scores, self._judged, self._gates = self.own, {}, None

    def chosen(self, dropped: int) -> dict[str, KeepSet]:
        """What each method keeps."""
        budget = self.n - dropped
        by_fit = lambda scores: KeepSet.of(sorted(ranked_layers(scores)[:budget]))  # noqa: E731
        found = (
            by_fit(self.corpus),
            by_fit(self.own),
            self.uniform(budget)[0],
            self.swift(budget)[0],
            self.greedy(budget)[0],
            self.auto(budget)[0],
        )
        return dict(zip(METHODS, found, strict=True))

    def judged(self, method: str, dropped: int, keep: KeepSet, fitter: BridgeFitter) -> dict[str, Any]:
        """A row of the table."""
        row: dict[str, Any] = {"method": method, "dropped": dropped, "keep": str(keep)}
        row["full"] = self._figures(keep, self.test.run(keep, DRAFT_TOKENS), self.cost)
        int8 = DraftView.at(keep, "int8")
        row["int8"] = self._figures(int8, self.test.run(int8, DRAFT_TOKENS), self.costs)
        if dropped and not keep.partial:  # bridges stand in for whole layers
            for name, (kind, rank) in BRIDGES.items():
                fitted = fitter.fit(keep.layers, kind, rank)  # type: ignore[arg-type]
                runs = self.test.run(KeepSet.of(keep.layers), DRAFT_TOKENS, bridges=fitted.bridges)
                row[name] = self._figures(keep, runs, self.cost)
        return row

    @staticmethod
    def _figures(view: KeepSet, runs: Any, costs: Costs) -> dict[str, float]:
        rounds = runs.rounds(DRAFT_TOKENS)
        speed = costs.speedup(view, DRAFT_TOKENS, rounds.mean_accepted_length)
        return {"acceptance": round(rounds.acceptance_rate, 3), "speedup": round(speed, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--dropped", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    console = Console(stderr=True)
    folder = resolve_model_dir(asked.model)
    bench = RealBench(folder, asked.plan, console)
    fitter = BridgeFitter(bench.stack, bench.held_text)
    whole = KeepSet.of(range(bench.n))
    rows = [bench.judged("nothing dropped", 0, whole, fitter)]
    for dropped in asked.dropped:
        with console.status(f"{dropped} layers dropped"):
            rows += [bench.judged(m, dropped, k, fitter) for m, k in bench.chosen(dropped).items()]
        console.print(_table(rows[-len(METHODS) :]))
        if asked.out:  # after each: what was measured is kept if the rest is interrupted
            save_results(asked.out, _content(asked.model, folder, bench, rows))


def _content(model: str, folder: Path, bench: RealBench, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "date": str(date.today()),
        "command": f"python -m benchmarks.studies.layers_dropped {folder.name} --plan PLAN",
        "model": folder.name,
        "weights": weights_of(model, folder),
        "layers": bench.n,
        "draft_tokens": DRAFT_TOKENS,
        "test_chats": len(bench.test.text.ids),
        "machine": processor(),
        "git_sha": git_sha(),
        "rows": rows,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("dropped", "method", "full", "int8", *BRIDGES)
    for r in rows:
        cells = [
            f"{r[c]['acceptance']:.2f} {r[c]['speedup']:.2f}x" if c in r else "-"
            for c in ("full", "int8", *BRIDGES)
        ]
        table.add_row(str(r["dropped"]), r["method"], *cells)
    return table


if __name__ == "__main__":
    main()

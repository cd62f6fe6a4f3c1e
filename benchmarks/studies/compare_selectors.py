"""Which way of choosing what drafts is best at equal draft cost, and what each search takes.

    python -m benchmarks.studies.compare_selectors MODEL [MODEL ...] [--out benchmarks/results/selectors.json]
    python -m benchmarks.studies.compare_selectors --table    # of the results, for docs/concepts/search.md

MODEL is a folder, or `demo` for the embedded demo target; `benchmarks/studies/bridges.py --train-plain FOLDER`
makes a model that nobody taught to skip. A part of the model costs what share of the layers' weights it
holds (a device bound by memory), the head included, and nothing else costs anything. Every method gets
the same budgets, in layers' worth of weights; it searches on the target's own text, and its keep set
is judged on other such text, 4 draft tokens a round. `free` lets the selectors of `sdfp plan` choose
the budget and the draft length as well.

Rivals are reimplemented from their public code on this package's forward: SWIFT (one text of 32 tokens,
matchness, first and last layer kept, 1000 tries at most, stop after 300 without gain or above 0.95, every
25th try Bayesian) and Draft&Verify (Bayesian over 2L switches, 8 texts of 32 tokens, tokens per time;
here the exact rollout stands in for its timed generation, and --draft-verify-tries of its 1000 are
made). Both get their sets by filling the budget in the order of the switches. The Gaussian process is
scikit-learn's, set up as in the bayes_opt package that both use.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from benchmarks.common.published import RESULTS
from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.plan.costs import Costs
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner.calibration import load_calibration
from sdfp_vllm.planner.families import nested_keep_sets
from sdfp_vllm.planner.first_step import FirstStep
from sdfp_vllm.planner.fisher import fisher_scores
from sdfp_vllm.planner.gradient import learn_gates
from sdfp_vllm.planner.local import SCREENED_TEXTS, log_gain
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.rollout import Continuations, DraftRollout, greedy_continuations
from sdfp_vllm.planner.search import Trial, best_trial, ranked_layers
from sdfp_vllm.planner.selectors import SELECTORS, Problem
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests import toy

DRAFT_TOKENS = 4
TEST_TEXTS = 256  # many more than are searched on: with 64 the error of a difference was up to 4 %
RESULT = RESULTS / "selectors.json"
_SWIFT = {"window": 32, "tries": 1000, "patience": 300, "enough": 0.95, "bayes": 25}
_KAPPA = 2.5  # of the upper confidence bound, as SWIFT sets it


class Counting:
    """A rollout that counts how often it is run."""

    def __init__(self, rollout: DraftRollout):
        self._rollout, self.runs = rollout, 0

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        return self._rollout.run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rollout, name)


class Bench:
    """One model, its texts and scores, and every method on it."""

    def __init__(self, folder: Path, draft_verify_tries: int):
        o = PlanOptions()
        self.stack = DecoderStack(load_target(folder, torch.float32))
        self.n, self.dv_tries = self.stack.num_layers, draft_verify_tries
        tokenizer = load_tokenizer(folder)
        count = o.text_sequences
        prompts = load_calibration(
            None, tokenizer, sequences=2 * count + TEST_TEXTS, length=o.prompt, seed=o.seed + 1
        )
        text = greedy_continuations(self.stack, prompts.ids, o.new_tokens)
        judging, rest = text.split(count)
        held, test = rest.split(count)  # type: ignore[union-attr]
        self.judging, self.held, self.test = (DraftRollout(self.stack, t) for t in (judging, held, test))
        self.cost = weights_cost(self.stack)
        calibration = load_calibration(None, tokenizer, sequences=o.sequences, length=o.length, seed=o.seed)
        began = time.process_time()
        self.scores = fisher_scores(self.stack, calibration.ids)
        self.fisher_seconds = time.process_time() - began
        self._judged: dict[tuple[str, int], Trial] = {}
        self._gates: tuple[torch.Tensor, float] | None = None

    # ------------------------------------------------------------ ours
    def fit(self, budget: int) -> tuple[KeepSet, int, float]:
        return KeepSet.of(sorted(ranked_layers(self.scores)[:budget])), 0, self.fisher_seconds

    def auto(self, budget: int) -> tuple[KeepSet, int, float]:
        counted = Counting(self.judging), Counting(self.held)
        given = Problem(*counted, self.scores, self.cost, layers=budget, draft_tokens=DRAFT_TOKENS)  # type: ignore[arg-type]
        keep = SELECTORS["auto"](given).keep
        return keep, sum(c.runs for c in counted), self.fisher_seconds

    def gradient(self, budget: int) -> tuple[KeepSet, int, float]:
        spent = 0.0
        if self._gates is None:  # one training serves every budget, and is counted for each
            began = time.process_time()
            gates = learn_gates(FirstStep(self.judging), self.cost)
            spent = time.process_time() - began
            self._gates = gates, spent
        gates, seconds = self._gates
        family = nested_keep_sets(
            gates, self.cost, list(range(budget, 0, -1))
        )  # the largest with attention in it
        return family[0], 0, seconds - spent

    # ------------------------------------------------------------ rivals
    def uniform(self, budget: int) -> tuple[KeepSet, int, float]:
        return KeepSet.of([round(i * (self.n - 1) / (budget - 1)) for i in range(budget)]), 0, 0.0

    def first(self, budget: int) -> tuple[KeepSet, int, float]:
        return KeepSet.of(range(budget)), 0, 0.0

    def greedy(self, budget: int) -> tuple[KeepSet, int, float]:
        """Removes, again and again, the layer whose removal leaves the draft closest to the full model."""
        screen = FirstStep(self.judging, SCREENED_TEXTS)
        kept, tries = list(range(self.n)), 0
        while len(kept) > budget:
            without = [KeepSet.of(k for k in kept if k != i) for i in kept]
            tries += len(without)
            screen.center(KeepSet.of(kept))
            kept = list(max(without, key=screen.overlap).layers)
        return KeepSet.of(kept), tries, 0.0

    def swift(self, budget: int) -> tuple[KeepSet, int, float]:
        """SWIFT's search; a try is one forward over 33 tokens of one text."""
        rng = np.random.default_rng(2024)
        text = self.judging.text
        first, window = text.first, _SWIFT["window"] + 1
        ids = text.ids[:1]
        cache = DynamicCache(config=self.stack.config)
        with torch.no_grad():
            self.stack.model(input_ids=ids[:, :first], past_key_values=cache, use_cache=True)

        @torch.no_grad()
        def matchness(keep: KeepSet) -> float:
            with self.stack.keeping(keep) as model:
                written = ids[:, first : first + window]
                past = copy.deepcopy(cache)
                logits = model(
                    input_ids=written,
                    past_key_values=past,
                    use_cache=True,
                    position_ids=torch.arange(first, first + window)[None],
                ).logits
            return float((logits[0, :-1].argmax(-1) == written[0, 1:]).float().mean())

        free = 2 * (self.n - 2)

        def keep_of(switches: np.ndarray) -> KeepSet:
            return self.fill(
                np.pad(switches.reshape(2, -1), ((0, 0), (1, 1)), constant_values=np.inf), budget
            )

        points, found = [], []
        best, score, idle = keep_of(rng.random(free)), 0.0, 0
        for attempt in range(1, int(_SWIFT["tries"]) + 1):
            x = rng.random(free)
            if attempt % _SWIFT["bayes"] == 0:
                x = suggest(points, found, free, rng)
            keep = keep_of(x)
            points.append(self.switches(keep)[:, 1:-1].flatten())
            found.append(matchness(keep))
            idle = 0 if found[-1] > score else idle + 1
            if found[-1] > score:
                best, score = keep, found[-1]
            if score > _SWIFT["enough"] or idle > _SWIFT["patience"]:
                break
        return best, attempt, 0.0

    def draft_verify(self, budget: int) -> tuple[KeepSet, int, float]:
        """Draft&Verify's search; a try is a rollout over 8 texts of 32 tokens."""
        rng = np.random.default_rng(1)
        text = self.judging.text
        ends = text.ends[:8].clamp(max=text.first + 32)
        rollout = DraftRollout(self.stack, Continuations(text.ids[:8, : text.first + 32], text.first, ends))

        def speed(keep: KeepSet) -> float:
            rounds = rollout.run(keep, DRAFT_TOKENS).rounds(DRAFT_TOKENS)
            return self.cost.speedup(keep, DRAFT_TOKENS, rounds.mean_accepted_length)

        points, found, keeps = [], [], []
        for _ in range(self.dv_tries):
            x = suggest(points, found, 2 * self.n, rng) if points else rng.random(2 * self.n)
            keep = self.fill(x.reshape(2, -1), budget)
            points.append(self.switches(keep).flatten())
            found.append(speed(keep))
            keeps.append(keep)
        return keeps[int(np.argmax(found))], self.dv_tries, 0.0

    # ------------------------------------------------------------ helpers
    def fill(self, values: np.ndarray, budget: int) -> KeepSet:
        """Keeps branches by falling value [2, L] as long as they fit; attention somewhere, so that it can draft."""
        chosen: tuple[list[int], list[int]] = ([], [])
        price = self.cost.attention["full"][0], self.cost.mlp["full"][0]
        left = budget * sum(price) * (1 + 1e-9)
        if not (values == np.inf).any():
            values = values.copy()
            values[0, values[0].argmax()] = np.inf
        for unit in np.argsort(-values, axis=None):
            branch, i = divmod(int(unit), self.n)
            if price[branch] <= left:
                left -= price[branch]
                chosen[branch].append(i)
        return KeepSet.from_branches(*chosen)

    def switches(self, keep: KeepSet) -> np.ndarray:
        return np.array([[float(b in keep.branches(i)) for i in range(self.n)] for b in ("attention", "mlp")])

    def row(self, method: str, search: Callable[[int], tuple[KeepSet, int, float]], budget: int) -> dict:
        began = time.process_time()
        keep, tries, before = search(budget)
        seconds = time.process_time() - began + before
        trial = best_trial(keep, self.test.run(keep, DRAFT_TOKENS), self.cost, [DRAFT_TOKENS])
        self._judged[method, budget] = trial
        rounds = trial.runs.rounds(DRAFT_TOKENS)
        row = {
            "method": method,
            "budget": budget,
            "keep": str(keep),
            "cost": round(self.cost.layers_ms(keep, 1), 3),
            "tokens_a_round": round(rounds.mean_accepted_length, 3),
            "acceptance": round(rounds.acceptance_rate, 3),
            "speedup": round(trial.speedup, 3),
            "tries": tries,
            "cpu_seconds": round(seconds, 2),
        }
        print(json.dumps(row), flush=True)
        return row

    def against_auto(self, row: dict) -> dict:
        """The row with the log of its speed over `auto`'s at the same budget, and that one's standard error."""
        ours, theirs = (self._judged[method, row["budget"]] for method in (row["method"], "auto"))
        return row | {"against_auto": [round(x, 3) for x in log_gain(ours, theirs, self.cost)]}

    def free(self, method: str) -> dict:
        """What `sdfp plan --selector` would choose, budget and draft length included."""
        counted = Counting(self.judging), Counting(self.held)
        began = time.process_time()
        made = SELECTORS[method](Problem(*counted, self.scores, self.cost))  # type: ignore[arg-type]
        seconds = time.process_time() - began + (0 if method == "gradient" else self.fisher_seconds)
        rounds = self.test.run(made.keep, made.draft_tokens).rounds(made.draft_tokens)
        row = {
            "method": method,
            "budget": "free",
            "keep": str(made.keep),
            "cost": round(self.cost.layers_ms(made.keep, 1), 3),
            "draft_tokens": made.draft_tokens,
            "tokens_a_round": round(rounds.mean_accepted_length, 3),
            "acceptance": round(rounds.acceptance_rate, 3),
            "predicted": round(made.prediction.speedup, 3),
            "speedup": round(self.cost.speedup(made.keep, made.draft_tokens, rounds.mean_accepted_length), 3),
            "tries": sum(c.runs for c in counted),
            "cpu_seconds": round(seconds, 2),
        }
        print(json.dumps(row), flush=True)
        return row


def weights_cost(stack: DecoderStack) -> Costs:
    """A layer costs 1, its branches and the head by their share of weights; rows and overheads nothing."""
    size = [
        sum(p.numel() for _, p in part(0)) for part in (stack.attention_parameters, stack.layer_parameters)
    ]
    head = sum(p.numel() for p in stack.head.parameters())
    attention = size[0] / size[1]
    return Costs(
        rows=[1, 2],
        attention={"full": [attention] * 2},
        mlp={"full": [1 - attention] * 2},
        head={"full": [head / size[1]] * 2},
        num_layers=stack.num_layers,
        device="weights read",
        dtype="float32",
        threads=1,
        round_overhead_ms=0.0,
        draft_overhead_ms=0.0,
    )


def suggest(points: list, values: list, size: int, rng: np.random.Generator) -> np.ndarray:
    """The most promising of 10,000 random points, by a Gaussian process's upper confidence bound."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    model = GaussianProcessRegressor(
        Matern(nu=2.5), alpha=1e-2, normalize_y=True, n_restarts_optimizer=5, random_state=1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(np.array(points), np.array(values))
        x = rng.random((10_000, size))
        mean, deviation = model.predict(x, return_std=True)
    return x[int(np.argmax(mean + _KAPPA * deviation))]


def compare(folder: Path, budgets: list[int], draft_verify_tries: int) -> dict[str, Any]:
    bench = Bench(folder, draft_verify_tries)
    methods = {
        "fit": bench.fit,
        "auto": bench.auto,
        "gradient": bench.gradient,
        "uniform": bench.uniform,
        "first N": bench.first,
        "greedy removal": bench.greedy,
        "SWIFT's search": bench.swift,
        "Draft&Verify's search": bench.draft_verify,
    }
    rows = [bench.row(name, search, budget) for budget in budgets for name, search in methods.items()]
    rows = [bench.against_auto(row) for row in rows]
    rows += [bench.free(method) for method in ("fit", "auto", "gradient")]
    return {
        "model": folder.name,
        "layers": bench.n,
        "parameters": sum(p.numel() for p in bench.stack.model.parameters()),
        "draft_tokens": DRAFT_TOKENS,
        "test_texts": TEST_TEXTS,
        "draft_verify_tries": draft_verify_tries,
        "fisher_cpu_seconds": round(bench.fisher_seconds, 2),
        "attention_share": round(bench.cost.attention["full"][0], 3),
        "head": round(bench.cost.head["full"][0], 3),
        "rows": rows,
        "provenance": provenance(),
    }


def table(results: dict[str, Any]) -> str:
    lines = []
    for name, result in results.items():
        lines += [f"\n{name}: {result['layers']} layers, {result['parameters'] / 1e6:.1f}M parameters\n"]
        lines += ["| budget | method | keeps | tokens a round | acceptance | speedup | tries | CPU s |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for r in result["rows"]:
            lines.append(
                f"| {r['budget']} | {r['method']} | {r['keep']} | {r['tokens_a_round']:.2f} | "
                f"{r['acceptance']:.2f} | {r['speedup']:.2f} | {r['tries']} | {r['cpu_seconds']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--draft-verify-tries", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    for model in asked.models:
        folder = toy.MODEL if model == "demo" else Path(model)
        results[model if model == "demo" else folder.name] = compare(
            folder, asked.budgets, asked.draft_verify_tries
        )
        part = asked.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, asked.out)
    if asked.table:
        print(table(results))


if __name__ == "__main__":
    main()

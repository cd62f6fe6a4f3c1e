"""Ways to spend less on the digits diffusion models, in one run and one table, on the same noise seeds.

    python -m benchmarks.studies.dipgo dit  --rivals FOLDER --out benchmarks/results/dipgo_dit.json
    python -m benchmarks.studies.dipgo unet --rivals FOLDER --out benchmarks/results/dipgo_unet.json
    python -m benchmarks.studies.dipgo flow --rivals FOLDER --out benchmarks/results/dipgo_flow.json

Every method gets at most the budget's share of the full run's MACs, give or take 0.5 % of them for
what always runs. Searches see other seeds than
the table does. `latency` is CPU time over the full run's, one thread, medians of runs that take
turns; `search` is CPU seconds, for all budgets together but for greedy removal, which goes on from one to the next. The
paper's learned search takes longer than all else together: `dipgo_learned.py` runs it, and `--learned` says what that wrote. FOLDER holds DeepCache and
cache-dit (pip install --no-deps --target FOLDER DeepCache cache-dit); without it they are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rivals import dpcache, packages
from benchmarks.studies.dipgo_learned import GUIDANCE, STEPS, LearnedRun, learned_task, load_run
from sdfp_vllm.common.progress import stages
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.dipgo.budget import gates_at_budget
from sdfp_vllm.dipgo.curve import find_curve
from sdfp_vllm.dipgo.forecast import Forecasts
from sdfp_vllm.dipgo.job import SearchOptions
from sdfp_vllm.dipgo.layout import Gates
from sdfp_vllm.dipgo.quality import psnr, ssim
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.task import Task, task_of
from tests.toy.digits.data import CLASSES
from tests.toy.digits.judge import judge
from tests.toy.digits.pipelines import digits_folder, digits_pipeline

BUDGETS = (0.75, 0.5, 0.35, 0.25)
SLACK = 0.005
NATIVE = "native fewer steps"
# Seeds that rivals choose their settings on; ours has others, and more (`curve.py`).
GREEDY_SEEDS = [5_000_000 + i for i in range(8)]
CALIBRATION_SEEDS = [5_000_000 + i for i in range(16)]
TEST_SEED = 9_700_000


@dataclass
class Entry:
    """One line of the results. `fid_behind` is how much larger its FID is than that of as many native steps, `fid_error` the standard error of that."""

    method: str
    budget: float
    compute: float
    search_seconds: float
    latency: float = 1.0
    psnr: float = 0.0
    ssim: float = 0.0
    accuracy: float = 0.0
    fid: float = 0.0
    fid_behind: float = 0.0
    fid_error: float = 0.0


Run = Callable[[], Tensor]


class Bench:
    """The model, the methods added so far, and the seeds that the table is of.

    Attributes:
        chain: Whether the denoiser is a chain of blocks, whose residuals can be reused.
    """

    def __init__(self, name: str, guidance: float, images: int, console: Console):
        self.name, self.guidance, self.console = name, guidance, console
        self.pipe = digits_pipeline(name)  # type: ignore[arg-type]
        self.conditions = load_conditions(self.pipe, digits_folder(name))  # type: ignore[arg-type]
        self.sampler = Sampler(self.pipe, self.conditions, STEPS, guidance)
        self.seeds = [TEST_SEED + i for i in range(images)]
        self.runs: list[tuple[Entry, Run]] = []
        self.step_task = task_of(self.sampler, "step", "output", 0, 1.0)
        self.chain = self.sampler.layout("block").residual

    def call(self, seeds: list[int]) -> Tensor:
        """The pipeline's public call, which rivals wrap; images in [-1, 1]."""
        made = self.pipe(
            **self.conditions.of(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=STEPS,
            guidance_scale=self.guidance,
            output_type="pt",
        ).images
        return made * 2 - 1

    def gates(
        self,
        method: str,
        budget: float,
        task: Task,
        gates: Gates,
        seconds: float = 0.0,
        forecasts: Forecasts | None = None,
    ) -> None:
        gates = task.layout.closure(gates, task.reuse)
        entry = Entry(method, budget, task.macs.share(gates), seconds)
        self.runs.append((entry, lambda: task.run(gates, self.seeds, forecasts)))
        self.console.print(f"{method} at {budget:.0%}: {entry.compute:.1%} compute, search {seconds:.0f} s")


def uniform(calls: int, units: int, count: int) -> Gates:
    """`count` calls that run, evenly spaced from the first on."""
    gates = np.zeros((calls, units), dtype=bool)
    gates[np.floor(np.arange(count) * calls / count).astype(int)] = True
    return gates


def nearness(made: Tensor, full: Tensor) -> float:
    """Mean PSNR in dB: what the table states is what every method chooses by."""
    return psnr(made, full).mean().item()


def most_uniform(task: Task, budget: float) -> Gates:
    calls, units = task.sampler.calls, len(task.layout.units)
    fitting = [
        g for n in range(1, calls + 1) if task.macs.share(g := uniform(calls, units, n)) <= budget + SLACK
    ]
    return fitting[-1]


def greedy_steps(task: Task, budgets: tuple[float, ...]) -> Iterator[tuple[float, Gates]]:
    """Removes whole calls one by one, each time the one whose removal costs least, measured on real generations."""
    with torch.no_grad():
        full = task.sampler.latents(GREEDY_SEEDS)
    gates = np.ones((task.sampler.calls, 1), dtype=bool)
    for budget in budgets:
        while task.macs.share(gates) > budget + SLACK:
            trials = []
            for t in range(1, len(gates)):
                if gates[t, 0]:
                    trial = gates.copy()
                    trial[t, 0] = False
                    trials.append(trial)
            gates = max(trials, key=lambda g: nearness(task.run(g, GREEDY_SEEDS), full))
        yield budget, gates.copy()


@contextlib.contextmanager
def cpu_seconds() -> Iterator[list[float]]:
    spent: list[float] = []
    began = time.process_time()
    yield spent
    spent.append(time.process_time() - began)


def add_methods(bench: Bench) -> None:
    sampler = bench.sampler
    for budget in BUDGETS:
        fewer = Sampler(bench.pipe, bench.conditions, int(budget * sampler.calls), bench.guidance)
        entry = Entry(NATIVE, budget, fewer.calls / sampler.calls, 0.0)
        bench.runs.append((entry, lambda s=fewer: s.latents(bench.seeds)))
    for order, name in ((0, "uniform step reuse"), (1, "uniform step reuse, straight line")):
        task = replace(bench.step_task, order=order)
        for budget in BUDGETS:
            bench.gates(name, budget, task, most_uniform(task, budget))
    if bench.chain:  # what FORA does, and TaylorSeer of first order
        for order, name in ((0, "uniform residual reuse"), (1, "uniform residual reuse, straight line")):
            task = task_of(sampler, "block", "residual", order, 1.0)
            for budget in BUDGETS:
                bench.gates(name, budget, task, most_uniform(task, budget))
    began = time.process_time()
    for budget, gates in greedy_steps(bench.step_task, BUDGETS):
        bench.gates("greedy step removal", budget, bench.step_task, gates, time.process_time() - began)


def add_learned(bench: Bench, run: LearnedRun) -> None:
    task = learned_task(bench.sampler)
    for budget in BUDGETS:
        gates = gates_at_budget(run.scores, budget, task.layout, task.macs, "output")
        bench.gates(
            f"DiP-GO as in the paper, {run.iterations} iterations", budget, task, gates, run.cpu_seconds
        )


def add_dpcache(bench: Bench) -> None:
    ways = [bench.step_task]
    if bench.chain:
        ways.append(task_of(bench.sampler, "block", "residual", 0, 1.0))
    with cpu_seconds() as spent:
        found = dpcache.search(ways, BUDGETS, SLACK, CALIBRATION_SEEDS)
    for budget, best in zip(BUDGETS, found, strict=True):
        bench.gates(f"DPCache ({best.setting})", budget, best.task, best.gates, spent[0], best.forecasts)


def add_ours(bench: Bench, rounds: int) -> None:
    options = SearchOptions(steps=STEPS, guidance_scale=bench.guidance, rounds=rounds)
    with cpu_seconds() as spent, stages(bench.console) as progress:
        # With the slack of the others: whole steps whose blocks' residuals are reused cost what always runs, too.
        curve = find_curve(bench.sampler, options, [b + SLACK for b in BUDGETS], progress)
    for budget, found in zip(BUDGETS, curve, strict=True):
        order = f"order {found.task.order}" if found.forecasts is None else "forecasts of their own"
        way = f"{found.granularity}, {found.task.reuse}, {order}"
        bench.gates(f"ours ({way})", budget, found.task, found.gates, spent[0], found.forecasts)


def add_rival(bench: Bench, rival: packages.Rival) -> None:
    """For each budget, the setting that fits it and is closest to the full run on the greedy search's seeds."""

    def run(setting: Any, seeds: list[int]) -> Tensor:
        handle = rival.on(setting)
        try:
            return bench.call(seeds)
        finally:
            rival.off(handle)

    tried = []
    with cpu_seconds() as spent:
        full, whole = executed(lambda: bench.call(GREEDY_SEEDS))
        for setting in rival.settings:
            try:
                made, macs = executed(lambda s=setting: run(s, GREEDY_SEEDS))
            except AssertionError as e:  # cache-dit, where a stream was not cached in the step before
                bench.console.print(f"{rival.name} ({setting}) does not run on this model: {e}")
                continue
            tried.append((macs / whole, nearness(made, full), setting))
    for budget in BUDGETS:
        fitting = [t for t in tried if t[0] <= budget + SLACK]
        if not fitting:
            bench.console.print(f"{rival.name}: no setting within {budget:.0%}")
            continue
        share, _, setting = max(fitting, key=lambda t: t[1])
        bench.console.print(f"{rival.name} at {budget:.0%}: {share:.1%} compute, {setting}")
        entry = Entry(f"{rival.name} ({str(setting).strip('()')})", budget, share, spent[0])
        bench.runs.append((entry, lambda s=setting: run(s, bench.seeds)))


def executed(run: Run) -> tuple[Tensor, int]:
    """What a run gives, and the MACs it really executes, for methods that decide as they go."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        made = run()
    return made, counter.get_total_flops() // 2


def measure(bench: Bench, repeats: int) -> list[Entry]:
    with torch.no_grad():
        full = bench.sampler.latents(bench.seeds)
    labels = bench.conditions.of(bench.seeds)
    if "class_labels" in labels:
        classes = labels["class_labels"]
    else:  # one-hot tokens, one per digit
        classes = labels["prompt_embeds"][..., : CLASSES + 1].argmax(-1).flatten().tolist()
    everything: list[tuple[Entry, Run]] = [
        (Entry("full run", 1.0, 1.0, 0.0), lambda: bench.sampler.latents(bench.seeds)),
        *sorted(bench.runs, key=lambda run: run[0].method != NATIVE),  # which others are compared with
    ]
    seconds: list[list[float]] = [[] for _ in everything]
    native: dict[float, Tensor] = {}
    with stages(bench.console) as progress, progress.step("Measuring", repeats * len(everything)) as advance:
        for _ in range(repeats):
            for i, (entry, run) in enumerate(everything):
                with torch.no_grad(), cpu_seconds() as spent:
                    made = run()
                seconds[i] += spent
                entry.psnr, entry.ssim = psnr(made, full).mean().item(), ssim(made, full).mean().item()
                entry.accuracy, entry.fid = judge().accuracy(made, classes), judge().fid(made)
                if entry.method == NATIVE:
                    native[entry.budget] = made
                elif entry.budget in native:
                    entry.fid_behind, entry.fid_error = judge().fid_behind(made, native[entry.budget])
                advance(1, entry.method)
    for (entry, _), spent in zip(everything, seconds, strict=True):
        entry.latency = statistics.median(spent) / statistics.median(seconds[0])
    return [entry for entry, _ in everything]


def show(console: Console, title: str, entries: list[Entry]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in (
        "budget",
        "method",
        "compute",
        "latency",
        "PSNR",
        "SSIM",
        "accuracy",
        "FID",
        "behind native",
        "search s",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for e in sorted(entries, key=lambda e: (-e.budget, -e.psnr)):
        table.add_row(
            f"{e.budget:.0%}", e.method, f"{e.compute:.1%}", f"{e.latency:.2f}", f"{e.psnr:.2f}",
            f"{e.ssim:.4f}", f"{e.accuracy:.1%}", f"{e.fid:.2f}",
            f"{e.fid_behind:+.2f} ± {e.fid_error:.2f}", f"{e.search_seconds:.0f}",
        )  # fmt: skip
    console.print(table)


def versions(names: list[str]) -> dict[str, str]:
    return {name: version(name) for name in names}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", choices=["dit", "unet", "flow"])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--guidance", type=float, default=GUIDANCE)
    p.add_argument("--images", type=int, default=128)
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--learned", type=Path, help="what dipgo_learned.py wrote for this model")
    p.add_argument("--rounds", type=int, default=SearchOptions.rounds, help="of refinement")
    p.add_argument("--only-ours", action="store_true")
    p.add_argument("--rivals", type=Path, help="folder with DeepCache and cache-dit")
    a = p.parse_args()
    torch.set_num_threads(1)
    console = Console(width=130)
    began = time.time()
    bench = Bench(a.model, a.guidance, a.images, console)
    if a.rivals:
        sys.path.append(str(a.rivals))
        add_rival(
            bench,
            packages.cache_dit(bench.pipe, STEPS) if bench.chain else packages.deepcache(bench.pipe),
        )
    if not a.only_ours:
        add_dpcache(bench)
        add_methods(bench)
        if a.learned:
            add_learned(bench, load_run(a.learned, a.model, a.guidance))
    add_ours(bench, a.rounds)
    entries = measure(bench, a.repeats)
    title = f"Digits {a.model}: {STEPS} steps {type(bench.pipe.scheduler).__name__}, guidance {a.guidance:g}, {a.images} images"
    show(console, title, entries)
    content = {
        "title": title,
        "settings": {k: str(v) for k, v in vars(a).items() if k not in ("out", "rivals")},
        "packages": versions(["diffusers", *(["DeepCache", "cache-dit"] if a.rivals else [])]),
        "entries": [asdict(e) for e in entries],
        "provenance": provenance(),
        "wall_seconds": time.time() - began,
    }
    save_results(a.out, content)


if __name__ == "__main__":
    sys.exit(main())

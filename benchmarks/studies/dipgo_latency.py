"""Budgets in measured latency: what a plan was predicted to take of the full run's time, and what it takes.

    python -m benchmarks.studies.dipgo_latency --out benchmarks/results/dipgo_latency.json

Plans for the digits models, searched for a share of the latency and for the same share of the MACs (whose latency
is predicted too). One thread and CPU time, `--images` at once in measuring, prediction and test; plan and full run take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from examples.digits import GUIDANCE
from sdfp_vllm.common.progress import stages
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.dipgo.job import SearchOptions, find, quality
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.stopwatch import measure_latency
from tests.toy.digits.pipelines import digits_folder, digits_pipeline

BUDGETS = (0.75, 0.5, 0.35)
STEPS = 20
TEST_SEED = 9_500_000


def row(sampler: Sampler, options: SearchOptions, repeats: int) -> dict[str, Any]:
    with stages(None) as progress:
        found = find(sampler, options, progress)
    task, images = found.task, options.latency_images
    predicted = measure_latency(sampler, task.layout, task.reuse, task.order, images)
    if options.cost == "latency":
        predicted = task.cost  # type: ignore[assignment]  # what the plan was chosen with
    seconds: dict[str, list[float]] = {"plan": [], "full": []}
    for repeat in range(repeats + 1):
        seeds = [TEST_SEED + repeat * images + i for i in range(images)]
        for name in seconds:
            with torch.no_grad():
                began = time.thread_time()
                task.run(found.gates, seeds, found.forecasts) if name == "plan" else sampler.latents(seeds)
            if repeat:
                seconds[name].append(time.thread_time() - began)
    return {
        "cost": options.cost,
        "budget": options.budget,
        "way": f"{found.granularity}, {task.reuse}, order {task.order}",
        "compute": task.macs.share(found.gates),
        "predicted": predicted.share(found.gates),
        "measured": min(seconds["plan"]) / min(seconds["full"]),
        "psnr": quality(task, found.gates, [TEST_SEED + i for i in range(32)], found.forecasts).psnr,
        "seconds": seconds,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--images", type=int, default=1)
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--rounds", type=int, default=1, help="of refinement")
    a = p.parse_args()
    torch.set_num_threads(1)
    console, began, rows = Console(width=130), time.time(), []
    for model in ("dit", "unet"):
        pipe = digits_pipeline(model)  # type: ignore[arg-type]
        sampler = Sampler(pipe, load_conditions(pipe, digits_folder(model)), STEPS, GUIDANCE)  # type: ignore[arg-type]
        options = SearchOptions(
            steps=STEPS, guidance_scale=GUIDANCE, rounds=a.rounds, latency_images=a.images
        )
        for budget in BUDGETS:
            for cost in ("latency", "macs"):
                rows.append(
                    {"model": model, **row(sampler, replace(options, budget=budget, cost=cost), a.repeats)}
                )
                console.print({k: v for k, v in rows[-1].items() if k != "seconds"})
    table = Table(title=f"Digits, {STEPS} steps, {a.images} at once", title_justify="left")
    for heading in ("model", "budget", "compute", "predicted", "measured", "PSNR", "way"):
        table.add_column(heading)
    for r in rows:
        table.add_row(
            r["model"], f"{r['budget']:.0%} of {r['cost']}", f"{r['compute']:.1%}", f"{r['predicted']:.3f}",
            f"{r['measured']:.3f}", f"{r['psnr']:.1f}", r["way"],
        )  # fmt: skip
    console.print(table)
    content = {
        "settings": {k: str(v) for k, v in vars(a).items()},
        "rows": rows,
        "provenance": provenance(),
        "wall_seconds": time.time() - began,
    }
    save_results(a.out, content)


if __name__ == "__main__":
    sys.exit(main())

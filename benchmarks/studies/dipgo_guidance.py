"""Plans against native fewer steps by strength of guidance, on the shipped digits models and on ones trained afresh.

    python tests/toy/digits/train.py dit --seed 41 --cpu-seconds 300 --out FOLDER/dit-41
    python -m benchmarks.studies.dipgo_guidance dit unet FOLDER/dit-41 --out benchmarks/results/dipgo_guidance.json

Likeness is PSNR in dB to the full run, on 40 seeds that no search saw. Native steps are as many as the budget allows. One
search serves all budgets of a model and guidance; its CPU time is given whole. Rows of other
models and guidances that the file holds already stay there, with the provenance of the run that made them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tests.toy.digits.identity_vae  # noqa: F401  # so that diffusers finds its class
from sdfp_vllm.common.progress import stages
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.dipgo.curve import find_curve
from sdfp_vllm.dipgo.job import FullRun, SearchOptions, fewer_steps, quality
from sdfp_vllm.dipgo.pipelines import load_pipeline
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from tests.toy.digits.pipelines import digits_folder

STEPS = 20
BUDGETS = (0.75, 0.5, 0.35)
GUIDANCES = (1.0, 4.0, 7.5)
TEST_SEED = 9_500_000


@dataclass(frozen=True)
class Row:
    """One plan and the native steps of the same budget.

    Attributes:
        psnr, native: In dB, means over the unseen seeds.
        search_seconds: CPU time of the search for all budgets of this model and guidance.
        run: Which of the file's runs made it.
    """

    model: str
    guidance: float
    budget: float
    compute: float
    psnr: float
    ssim: float
    native_steps: int
    native: float
    way: str
    search_seconds: float
    run: int


def rows_of(
    model: str, guidance: float, budgets: list[float], images: int, rounds: int, run: int, console: Console
) -> list[Row]:
    """Searches a model at one guidance, and measures what is found on unseen seeds."""
    folder = digits_folder(model) if model in ("dit", "unet") else Path(model)  # type: ignore[arg-type]
    pipe = load_pipeline(folder)
    sampler = Sampler(pipe, load_conditions(pipe, folder), STEPS, guidance)
    options = SearchOptions(steps=STEPS, guidance_scale=guidance, rounds=rounds)
    began = time.process_time()
    with stages(console) as progress:
        curve = find_curve(sampler, options, budgets, progress)
    seconds = time.process_time() - began
    seeds = [TEST_SEED + i for i in range(images)]
    full = FullRun.of(sampler, seeds)
    rows = []
    for found in curve:
        made = quality(found.task, found.gates, seeds, found.forecasts, full)
        native = fewer_steps(sampler, found.task.budget, seeds, full)
        assert native is not None
        forecasts = f"order {found.task.order}" if found.forecasts is None else "forecasts of their own"
        rows.append(
            Row(
                model=folder.name,
                guidance=guidance,
                budget=found.task.budget,
                compute=found.task.macs.share(found.gates),
                psnr=made.psnr,
                ssim=made.ssim,
                native_steps=native.steps,
                native=native.psnr,
                way=f"{found.granularity}, {found.task.reuse}, {forecasts}",
                search_seconds=seconds,
                run=run,
            )
        )
    return rows


def show(console: Console, rows: list[Row]) -> None:
    table = Table(title="PSNR to the full run, dB", title_justify="left")
    for heading in ("model", "guidance", "budget", "compute", "plan", "native", "lead", "way", "search s"):
        table.add_column(heading, justify="left" if heading in ("model", "way") else "right")
    for r in rows:
        table.add_row(
            r.model, f"{r.guidance:g}", f"{r.budget:.0%}", f"{r.compute:.1%}", f"{r.psnr:.1f}", f"{r.native:.1f}",
            f"{r.psnr - r.native:+.1f}", r.way, f"{r.search_seconds:.0f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("models", nargs="+", help="dit, unet, or the folder of a pipeline that train.py saved")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--guidance", type=float, nargs="+", default=list(GUIDANCES))
    p.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    p.add_argument("--images", type=int, default=40)
    p.add_argument("--rounds", type=int, default=SearchOptions.rounds, help="of refinement")
    a = p.parse_args()
    torch.set_num_threads(1)
    console = Console(width=130)
    held: dict[str, Any] = json.loads(a.out.read_text()) if a.out.exists() else {"runs": [], "rows": []}
    settings = {k: str(v) for k, v in vars(a).items() if k not in ("out", "models")}
    held["runs"].append({"settings": settings, "provenance": provenance()})
    rows = [Row(**r) for r in held["rows"]]
    for model in a.models:
        for guidance in a.guidance:
            made = rows_of(model, guidance, a.budgets, a.images, a.rounds, len(held["runs"]) - 1, console)
            new = {(r.model, r.guidance) for r in made}
            rows = sorted(
                [r for r in rows if (r.model, r.guidance) not in new] + made,
                key=lambda r: (r.model, r.guidance, -r.budget),
            )
            show(console, made)
            save_results(a.out, {"runs": held["runs"], "rows": [asdict(r) for r in rows]})


if __name__ == "__main__":
    sys.exit(main())

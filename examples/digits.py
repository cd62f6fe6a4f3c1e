"""`make demo-dipgo`: digits from the full run and from plans, same seeds, side by side."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.common.terminal import console
from sdfp_vllm.dipgo.job import SearchOptions, search_each
from sdfp_vllm.dipgo.pipelines import load_pipeline
from sdfp_vllm.dipgo.plan import DipgoPlan
from sdfp_vllm.dipgo.quality import psnr, ssim
from sdfp_vllm.dipgo.report import pyplot, save_figure, verdict
from sdfp_vllm.dipgo.runtime import apply_dipgo
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.errors import SdfpError
from tests.toy.digits.judge import judge
from tests.toy.digits.pipelines import digits_folder

GUIDANCE = 4.0
_SEED = 9_000_000
_REPEATS = 3
_SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One line of the table. `latency` is the time over the full run's; likeness is to the full run's images."""

    name: str
    compute: float
    latency: float
    psnr: float
    ssim: float
    accuracy: float
    fid: float


def run_demo(images: int, budgets: list[float], steps: int, out: Path, console: Console) -> list[Row]:
    """Searches plans for all budgets at once, generates, prints the table, and saves dipgo.json, dipgo.png and the plans in `out`.

    Raises:
        SdfpError: If an argument is out of range.
    """
    if images < _SHOWN:
        raise SdfpError("--images", f"is {images}", f"Give at least {_SHOWN}.")
    began = time.time()
    folder = digits_folder("dit")
    budgets = sorted(set(budgets), reverse=True)
    options = SearchOptions(steps=steps, guidance_scale=GUIDANCE)
    plans = search_each(folder, options, budgets, out, console)
    for budget, plan in zip(budgets, plans, strict=True):
        plan.save(out / f"dipgo-{budget:g}.json")
        console.print(verdict(plan))

    pipe = load_pipeline(folder)
    sampler = Sampler(pipe, load_conditions(pipe, folder), steps, GUIDANCE)
    seeds = [_SEED + i for i in range(images)]
    classes = sampler.conditions.of(seeds)["class_labels"]
    names = ["full run", *(f"DiP-GO plan, budget {budget:.0%}" for budget in budgets)]
    latents, seconds = _generate(sampler, [None, *plans], seeds)
    full = latents[0]
    rows = [
        Row(
            name=name,
            compute=1.0 if i == 0 else plans[i - 1].compute_share,
            latency=statistics.median(seconds[i]) / statistics.median(seconds[0]),
            psnr=psnr(made, full).mean().item(),
            ssim=ssim(made, full).mean().item(),
            accuracy=judge().accuracy(made, classes),
            fid=judge().fid(made),
        )
        for i, (name, made) in enumerate(zip(names, latents, strict=True))
    ]
    title = f"Digits DiT, {pipe.scheduler.__class__.__name__}, {steps} steps, guidance {GUIDANCE:g}, {images} images"
    _print(console, title, rows)
    _save(out, title, rows, plans, seconds, time.time() - began)
    _draw(out / "dipgo.png", names, latents, classes)
    console.print(f"Saved dipgo.json, dipgo.png and the plans in {out}; {time.time() - began:.0f} s in all.")
    return rows


def _generate(
    sampler: Sampler, plans: list[DipgoPlan | None], seeds: list[int]
) -> tuple[list[Tensor], list[list[float]]]:
    """Latents, which are the images here, and seconds of each repeat; plans take turns, for a machine that drifts."""
    latents: list[Tensor] = [torch.empty(0)] * len(plans)
    seconds: list[list[float]] = [[] for _ in plans]
    for _ in range(_REPEATS):
        for i, plan in enumerate(plans):
            handle = apply_dipgo(sampler.pipe, plan) if plan else None
            began = time.perf_counter()
            latents[i] = sampler.latents(seeds)
            seconds[i].append(time.perf_counter() - began)
            if handle:
                handle.remove()
    return latents, seconds


def _print(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in (
        "",
        "compute",
        "latency",
        "PSNR to full",
        "SSIM to full",
        "class accuracy",
        "feature FID",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for i, r in enumerate(rows):
        likeness = ("-", "-") if i == 0 else (f"{r.psnr:.1f} dB", f"{r.ssim:.4f}")
        table.add_row(
            r.name, f"{r.compute:.1%}", f"{r.latency:.2f}", *likeness, f"{r.accuracy:.1%}", f"{r.fid:.1f}"
        )
    console.print(table)


def _save(
    out: Path, title: str, rows: list[Row], plans: list[DipgoPlan], seconds: list[list[float]], wall: float
) -> None:
    content: dict[str, Any] = {
        "title": title,
        "rows": [asdict(r) for r in rows],
        "plans": [
            p.model_dump(mode="json", include={"granularity", "reuse", "order", "executed"}) for p in plans
        ],
        "seconds": seconds,
        "provenance": provenance(),
        "wall_seconds": wall,
    }
    save_results(out / "dipgo.json", content)


def _draw(path: Path, names: list[str], latents: list[Tensor], classes: list[int]) -> None:
    """One image of each class per run, a run per row."""
    plt = pyplot()
    shown = [classes.index(c) for c in sorted(set(classes))][:_SHOWN]
    figure, axes = plt.subplots(
        len(names), len(shown), figsize=(len(shown), 1.3 * len(names)), layout="constrained", squeeze=False
    )
    for line, name, made in zip(axes, names, latents, strict=True):
        for cell, i in zip(line, shown, strict=True):
            cell.imshow(made[i, 0].clamp(-1, 1), cmap="gray_r", vmin=-1, vmax=1)
            cell.axis("off")
        line[0].set_title(name, loc="left", fontsize=9)
    save_figure(figure, path)
    plt.close(figure)


def main(
    images: Annotated[int, typer.Option(help="Images to generate per plan.")] = 100,
    budgets: Annotated[str, typer.Option(help="Comma-separated shares of the full run's MACs.")] = "0.5,0.25",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 20,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for dipgo.json and dipgo.png.")] = Path(
        "out"
    ),
) -> None:
    """Searches plans for a small digits DiT, and compares full and pruned runs."""
    try:
        shares = [float(b) for b in budgets.split(",")]
    except ValueError as e:
        raise SdfpError("--budgets", f"{budgets!r} is not a list of numbers", "Write 0.5,0.25.") from e
    run_demo(images, shares, steps, out, console())


if __name__ == "__main__":
    typer.run(main)

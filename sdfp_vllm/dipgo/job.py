"""The offline search: a pipeline in, a plan out, or one for each of several budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from sdfp_vllm import __version__
from sdfp_vllm.common.progress import Stages, stages
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.dipgo.budget import gates_at_budget
from sdfp_vllm.dipgo.curve import RECORD, find_curve
from sdfp_vllm.dipgo.fingerprint import pipeline_fingerprint
from sdfp_vllm.dipgo.forecast import Forecasts
from sdfp_vllm.dipgo.latency import Latency
from sdfp_vllm.dipgo.layout import Gates, Granularity
from sdfp_vllm.dipgo.learn import LearnSettings, learn_scores
from sdfp_vllm.dipgo.options import SearchOptions, check
from sdfp_vllm.dipgo.pipelines import load_pipeline
from sdfp_vllm.dipgo.plan import DipgoPlan, FewerSteps, Provenance, Quality, forecast_rows, rows
from sdfp_vllm.dipgo.quality import psnr, ssim
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.signature import load_layout
from sdfp_vllm.dipgo.stopwatch import now
from sdfp_vllm.dipgo.task import Found, Task, task_of
from sdfp_vllm.errors import SdfpError

STATE_FILE = ".dipgo-search-partial.pt"
# The first seed of the images that quality is stated on; `curve.py` has those of the search.
_TEST = 3_000_000


def search(
    folder: str | Path, options: SearchOptions, out: Path, console: Console | None = None
) -> DipgoPlan:
    """Searches a plan for the pipeline in `folder` and returns it; an interrupted one is kept beside `out`.

    Raises:
        SdfpError: If an option is out of range or does not fit the pipeline, before any weight is loaded
            where that can be told.
    """
    return search_each(folder, options, [options.budget], out, console)[0]


def search_each(
    folder: str | Path,
    options: SearchOptions,
    budgets: Sequence[float],
    out: Path,
    console: Console | None = None,
) -> list[DipgoPlan]:
    """A plan for each of `budgets`, the largest first, from one search; `options.budget` is not read.

    Raises:
        SdfpError: As `search`.
    """
    for budget in budgets:
        check(replace(options, budget=budget))
    if len(budgets) > 1 and options.method == "learned":
        raise SdfpError(
            "--budget",
            "is given more than once, and a learned search has one",
            "Give the least; `sdfp dipgo budget PLAN BUDGET` makes the other plans from it.",
        )
    units = load_layout(options.layout) if options.layout else None
    began = time.perf_counter()
    pipe = load_pipeline(folder, options.dtype)
    sampler = Sampler(
        pipe,
        load_conditions(pipe, Path(folder), options.prompts),
        options.steps,
        options.guidance_scale,
        **dict(options.arguments),
    )
    sampler.units = units
    with stages(console) as progress:
        each = find_each(sampler, options, budgets, progress, out.parent / STATE_FILE)
    seconds = time.perf_counter() - began
    seeds = [_TEST + options.seed * 10_007 + i for i in range(options.test_images)]
    full = FullRun.of(sampler, seeds)
    return [_plan(sampler, str(folder), options, found, seeds, full, seconds) for found in each]


def _plan(
    sampler: Sampler,
    name: str,
    options: SearchOptions,
    found: Found,
    seeds: list[int],
    full: FullRun,
    seconds: float,
) -> DipgoPlan:
    """What was found as a plan, with how near it is to the full run of `seeds`."""
    return DipgoPlan(
        pipeline=name,
        fingerprint=pipeline_fingerprint(sampler.pipe),
        scheduler=sampler.scheduler,
        calls=sampler.rhythm,
        granularity=found.granularity,
        reuse=found.task.reuse,  # type: ignore[arg-type]  # checked by pydantic
        order=found.task.order,
        units=list(found.task.layout.units),
        executed=rows(found.gates),
        forecasts=None if found.forecasts is None else forecast_rows(found.gates, found.forecasts),
        macs=found.task.macs,
        latency=found.task.cost if isinstance(found.task.cost, Latency) else None,
        quality=quality(found.task, found.gates, seeds, found.forecasts, full),
        native=fewer_steps(sampler, found.task.budget, seeds, full),
        scores=None if found.scores is None else found.scores.tolist(),
        made=Provenance(
            method=options.method,
            budget=found.task.budget,
            cost=options.cost,
            guidance_scale=options.guidance_scale,
            seed=options.seed,
            iterations=options.iterations if options.method == "learned" else options.rounds,
            search_seconds=seconds,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            sdfp_version=__version__,
            torch_version=torch.__version__,
            diffusers_version=_diffusers_version(),
            git_sha=git_sha(),
        ),
    )


def find(sampler: Sampler, options: SearchOptions, progress: Stages, state_file: Path | None = None) -> Found:
    """The search itself, on a loaded pipeline."""
    return find_each(sampler, options, [options.budget], progress, state_file)[0]


def find_each(
    sampler: Sampler,
    options: SearchOptions,
    budgets: Sequence[float],
    progress: Stages,
    state_file: Path | None = None,
) -> list[Found]:
    """The search for several budgets, the largest first; the learned one takes a single one."""
    if options.method == "learned":
        return [_learned(sampler, replace(options, budget=budgets[0]), progress, state_file)]
    return find_curve(sampler, options, budgets, progress)


@dataclass(frozen=True)
class FullRun:
    """Images of the full run, and the seconds that their latents took."""

    images: Tensor
    seconds: float

    @classmethod
    def of(cls, sampler: Sampler, seeds: list[int]) -> FullRun:
        return cls(*_generated(sampler, lambda: sampler.latents(seeds)))


def _generated(sampler: Sampler, latents: Callable[[], Tensor]) -> tuple[Tensor, float]:
    with torch.no_grad():
        began = now(sampler)
        made = latents()
        seconds = now(sampler) - began
        return sampler.decode(made), seconds


def quality(
    task: Task,
    gates: Gates,
    seeds: list[int],
    forecasts: Forecasts | None = None,
    full: FullRun | None = None,
) -> Quality:
    """Agreement with the full run on `seeds`, where that is there already `full`."""
    full = full or FullRun.of(task.sampler, seeds)
    images, seconds = _generated(task.sampler, lambda: task.run(gates, seeds, forecasts))
    return Quality(
        images=len(seeds),
        psnr=psnr(images, full.images).mean().item(),
        ssim=ssim(images, full.images).mean().item(),
        time=seconds / full.seconds if seconds > 0 and full.seconds > 0 else None,
    )


def fewer_steps(
    sampler: Sampler, budget: float, seeds: list[int], full: FullRun | None = None
) -> FewerSteps | None:
    """What the pipeline gives in fewer steps, as many as `budget` allows of its calls: what any plan must beat.

    Args:
        full: The full run of `seeds`, where it is there already.

    Returns:
        None if the scheduler makes none.
    """
    for steps in range(min(int(budget * sampler.steps + 1e-9), sampler.steps - 1), 0, -1):
        try:
            fewer = sampler.with_steps(steps)
        except SdfpError:
            continue
        if fewer.calls <= budget * sampler.calls:
            break
    else:
        return None
    full = full or FullRun.of(sampler, seeds)
    images, _ = _generated(sampler, lambda: fewer.latents(seeds))
    return FewerSteps(steps=steps, psnr=psnr(images, full.images).mean().item())


def _learned(sampler: Sampler, options: SearchOptions, progress: Stages, state_file: Path | None) -> Found:
    granularity: Granularity = options.granularity or "block"
    task = task_of(
        sampler,
        granularity,
        options.reuse or "output",
        options.order or 0,
        options.budget,
        options.cost,
        options.latency_images,
    )
    chain = task.layout.residual or granularity == "step"
    settings = LearnSettings(
        iterations=options.iterations,
        budget=min(options.budget, LearnSettings.budget),
        learning_rate=options.learning_rate or (10.0 if chain else 0.1),
        consistency=options.consistency,
        seed=RECORD + options.seed,
    )
    with progress.step("Learning gates", settings.iterations) as advance:
        scores = learn_scores(
            sampler, task.layout, task.macs, task.reuse, settings, state_file, options.resume, advance
        )
    gates = gates_at_budget(scores, options.budget, task.layout, task.cost, task.reuse, task.stages)
    return Found(granularity, task, gates, scores)


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__

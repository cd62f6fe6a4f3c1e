"""The offline search: a pipeline in, a plan out."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from sdfp_vllm import __version__
from sdfp_vllm.common.progress import Stages, stages
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.dipgo.budget import check_cost, gates_at_budget
from sdfp_vllm.dipgo.cost import Cost, CostName
from sdfp_vllm.dipgo.fingerprint import pipeline_fingerprint
from sdfp_vllm.dipgo.forecast import Forecasts
from sdfp_vllm.dipgo.latency import Latency
from sdfp_vllm.dipgo.layout import Gates, Granularity, Layout
from sdfp_vllm.dipgo.learn import LearnSettings, learn_scores
from sdfp_vllm.dipgo.macs import MacCount, count_macs, step_macs
from sdfp_vllm.dipgo.objective import Consistency
from sdfp_vllm.dipgo.pipelines import load_pipeline
from sdfp_vllm.dipgo.plan import DipgoPlan, FewerSteps, Provenance, Quality, forecast_rows, rows
from sdfp_vllm.dipgo.quality import psnr, ssim
from sdfp_vllm.dipgo.refine import (
    Task,
    evenly,
    foresee,
    greedy,
    likeness,
    log_error,
    path,
    refine,
    slide,
    surest,
)
from sdfp_vllm.dipgo.sampling import Sampler, load_conditions
from sdfp_vllm.dipgo.signature import load_layout
from sdfp_vllm.dipgo.stopwatch import measure_latency
from sdfp_vllm.dipgo.surrogate import record
from sdfp_vllm.errors import SdfpError

STATE_FILE = ".dipgo-search-partial.pt"
# Seeds of images: those recorded, those that gates are compared on, those that decide how far refinement is believed,
# and those that quality is stated on.
_SEARCH, _COMPARE, _JUDGE, _TEST = 1_000_000, 2_000_000, 2_500_000, 3_000_000
_JUDGES = 2  # times as many images as gates are compared on

Method = Literal["fisher", "learned"]


@dataclass(frozen=True)
class SearchOptions:
    """What the user can ask of the search.

    Attributes:
        method: "fisher" (surrogate and refinement; ours) or "learned" (the paper's pruner network).
        granularity, reuse, order: None: for "fisher", what does best of all; for "learned", the paper's.
        budget: Share of the full run's cost that may be spent.
        cost: What the budget is a share of: MACs, or latency measured here.
        latency_images: Images that are generated at once when latency is measured.
        images: Images that a recording runs at once, and that gates are compared on.
        projections: Backward passes of a recording.
        rounds: Of refinement.
        test_images: That the plan's quality is stated on.
        iterations, learning_rate, consistency: Of the paper's search (None: its rate).
        resume: Go on with a search that was interrupted.
        layout: File with a description of the denoiser's blocks (`signature.save_layout`), for a class that cannot be read.
        arguments: Further arguments of the pipeline's call, as ("height", 512).
    """

    steps: int = 50
    budget: float = 0.5
    cost: CostName = "macs"
    latency_images: int = 1
    method: Method = "fisher"
    granularity: Granularity | None = None
    reuse: Literal["output", "residual"] | None = None
    order: int | None = None
    guidance_scale: float = 4.0
    prompts: Path | None = None
    dtype: str = "float32"
    images: int = 8
    projections: int = 4
    rounds: int = 4
    test_images: int = 16
    iterations: int = 200
    learning_rate: float | None = None
    consistency: Consistency = "ssim"
    seed: int = 0
    resume: bool = False
    layout: Path | None = None
    arguments: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Found:
    """Gates for a way of reuse, the scores they come from if they were learned, and forecasts if each gate has its own."""

    granularity: Granularity
    task: Task
    gates: Gates
    scores: NDArray | None = None
    forecasts: Forecasts | None = None


def search(
    folder: str | Path, options: SearchOptions, out: Path, console: Console | None = None
) -> DipgoPlan:
    """Searches a plan for the pipeline in `folder` and returns it; an interrupted one is kept beside `out`.

    Raises:
        SdfpError: If an option is out of range or does not fit the pipeline, before any weight is loaded
            where that can be told.
    """
    check(options)
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
        found = find(sampler, options, progress, out.parent / STATE_FILE)
    seeds = [_TEST + options.seed * 10_007 + i for i in range(options.test_images)]
    reached = quality(found.task, found.gates, seeds, found.forecasts)
    native = fewer_steps(sampler, options.budget, seeds)
    return DipgoPlan(
        pipeline=str(folder),
        fingerprint=pipeline_fingerprint(pipe),
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
        quality=reached,
        native=native,
        scores=None if found.scores is None else found.scores.tolist(),
        made=Provenance(
            method=options.method,
            budget=options.budget,
            cost=options.cost,
            guidance_scale=options.guidance_scale,
            seed=options.seed,
            iterations=options.iterations if options.method == "learned" else options.rounds,
            search_seconds=time.perf_counter() - began,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            sdfp_version=__version__,
            torch_version=torch.__version__,
            diffusers_version=_diffusers_version(),
            git_sha=git_sha(),
        ),
    )


def find(sampler: Sampler, options: SearchOptions, progress: Stages, state_file: Path | None = None) -> Found:
    """The search itself, on a loaded pipeline."""
    return (_learned if options.method == "learned" else _fisher)(sampler, options, progress, state_file)


def quality(task: Task, gates: Gates, seeds: list[int], forecasts: Forecasts | None = None) -> Quality:
    """Agreement with the full run on `seeds`."""
    with torch.no_grad():
        full = task.sampler.decode(task.sampler.latents(seeds))
        images = task.sampler.decode(task.run(gates, seeds, forecasts))
    return Quality(
        images=len(seeds), psnr=psnr(images, full).mean().item(), ssim=ssim(images, full).mean().item()
    )


def fewer_steps(sampler: Sampler, budget: float, seeds: list[int]) -> FewerSteps | None:
    """What the pipeline gives in fewer steps, as many as `budget` allows of its calls: what any plan must beat.

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
    with torch.no_grad():
        full = sampler.decode(sampler.latents(seeds))
        images = sampler.decode(fewer.latents(seeds))
    return FewerSteps(steps=steps, psnr=psnr(images, full).mean().item())


def macs_of(sampler: Sampler, layout: Layout) -> MacCount:
    """MACs of a step of the pipeline, all of its calls together.

    Raises:
        SdfpError: If its denoisers differ in size.
    """
    counts = [
        step_macs([count_macs(denoiser, layout, *call) for call in calls])
        for denoiser, calls in zip(sampler.denoisers, sampler.first_calls, strict=True)
    ]
    if any(count != counts[0] for count in counts):
        raise SdfpError(
            type(sampler.pipe).__name__,
            f"has denoisers of different sizes ({', '.join(sampler.rhythm.denoisers)})",
            "DiP-GO plans for experts of one size.",
        )
    return counts[0]


def task_of(
    sampler: Sampler,
    granularity: Granularity,
    reuse: str,
    order: int,
    budget: float,
    cost: CostName = "macs",
    latency_images: int = 1,
) -> Task:
    """The task of a way of reuse; `cost` "latency" measures it first.

    Raises:
        SdfpError: If the denoiser does not allow the way, or the budget is less than any plan costs.
    """
    layout = sampler.layout(granularity)
    if reuse == "residual" and not layout.residual:
        raise SdfpError(
            "--reuse residual",
            f"units of {type(sampler.denoiser).__name__} at {granularity} granularity change their input's shape",
            "Use --reuse output.",
        )
    macs = macs_of(sampler, layout)
    least = np.zeros((sampler.calls, len(layout.units)), dtype=bool)
    least[list(sampler.rhythm.stages)] = True
    counted: Cost = macs
    if cost == "latency":
        counted = measure_latency(sampler, layout, reuse, order, latency_images)
    if budget < (share := counted.share(least)):
        raise SdfpError(
            f"--budget {budget:g}",
            f"is less than the first call and what always runs, {share:.3f} of the {cost}",
            f"Give at least {share + 0.001:.3f}, or more steps.",
        )
    return Task(sampler, layout, macs, counted, reuse, order, budget)


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
        seed=_SEARCH + options.seed,
    )
    with progress.step("Learning gates", settings.iterations) as advance:
        scores = learn_scores(
            sampler, task.layout, task.macs, task.reuse, settings, state_file, options.resume, advance
        )
    gates = gates_at_budget(scores, options.budget, task.layout, task.cost, task.reuse, task.stages)
    return Found(granularity, task, gates, scores)


def _fisher(sampler: Sampler, options: SearchOptions, progress: Stages, _: Path | None) -> Found:
    ways = _ways(sampler, options)
    first = options.seed * 10_007
    seeds = [_SEARCH + first + i for i in range(options.images)]
    compare = [_COMPARE + first + i for i in range(options.images)]
    judges = [_JUDGE + first + i for i in range(_JUDGES * options.images)]
    with torch.no_grad():
        full, full_compare = (sampler.latents(s) for s in (seeds, compare))
        full_judges = sampler.decode(sampler.latents(judges))
    tried: list[tuple[float, Found]] = []

    def consider(granularity: Granularity, task: Task, gates: Gates) -> None:
        tried.append((log_error(task.run(gates, compare), full_compare), Found(granularity, task, gates)))

    def best(of: Granularity) -> Found:
        return min((t for t in tried if t[1].granularity == of), key=lambda t: t[0])[1]

    with progress.step("Recording and choosing gates", len(ways)) as advance:
        for granularity, task in ways:
            surrogate = record(sampler, task.layout, task.reuse, task.order, seeds, options.projections)
            gates = greedy(task, surrogate)
            # The surrogate's optimum is not always better than what greedy closing finds: both are tried.
            for candidate in (gates, *path(task, surrogate, gates)[-1:]):
                consider(granularity, task, candidate)
            # Nor is either always better than even steps, where few are left.
            if granularity == "step":
                consider(granularity, task, evenly(task))
            error, found = min(tried, key=lambda t: t[0])
            advance(1, f"Best so far: {found.granularity}, {-10 * error:.1f} dB")
    kinds = list(dict.fromkeys(granularity for granularity, _ in ways))
    # Which kind ends best shows only in the end, and not on the images that its gates were chosen on.
    ended: list[tuple[float, Found]] = []
    with progress.step("Refining", len(kinds) * (options.rounds + 1)) as advance:
        for kind in kinds:
            task = best(kind).task
            ranked = sorted((t for t in tried if t[1].task is task), key=lambda t: -t[0])
            line = [surest(task, [found.gates for _, found in ranked], judges, full_judges)]
            # What is on this line is there too when more rounds follow, so that more search never ends worse.
            if kind == "step" and options.rounds:
                line.append(slide(task, line[0], compare, full_compare))
            advance(1)
            line += refine(
                task, line[-1], seeds, full, compare, full_compare,
                options.rounds, options.projections, advance,
            )[1:]  # fmt: skip
            gates = surest(task, line, judges, full_judges)
            reached = float(likeness(task, gates, judges, full_judges).mean())
            ended.append((reached, Found(kind, task, gates)))
    found = max(ended, key=lambda e: e[0])[1]
    if options.order is not None or found.gates.all():
        return found
    with progress.step("Choosing forecasts", 1):
        forecasts = foresee(found.task, found.gates, seeds, full, judges, full_judges, options.projections)
    return replace(found, forecasts=forecasts)


def _ways(sampler: Sampler, options: SearchOptions) -> list[tuple[Granularity, Task]]:
    """Every way of reuse that the options leave open and the pipeline allows."""
    granularities: list[Granularity] = [options.granularity] if options.granularity else ["block", "step"]
    ways: list[tuple[Granularity, Task]] = []
    for granularity, order in itertools.product(
        granularities, [0, 1] if options.order is None else [options.order]
    ):
        residual = sampler.layout(granularity).residual
        reuse = options.reuse or ("residual" if residual else "output")
        task = task_of(
            sampler, granularity, reuse, order, options.budget, options.cost, options.latency_images
        )
        ways.append((granularity, task))
    return ways


def check(options: SearchOptions) -> None:
    """Refuses options that no pipeline can meet."""
    for flag, value, low in (
        ("--steps", options.steps, 2),
        ("--images", options.images, 1),
        ("--projections", options.projections, 1),
        ("--rounds", options.rounds, 0),
        ("--test-images", options.test_images, 1),
        ("--iterations", options.iterations, 1),
        ("--latency-images", options.latency_images, 1),
    ):
        if value < low:
            raise SdfpError(flag, f"is {value}", f"Give at least {low}.")
    if not 0 < options.budget <= 1:
        raise SdfpError(
            "--budget", f"is {options.budget:g}", "Give the share of the full run to spend, in (0, 1]."
        )
    check_cost(options.cost)
    for flag, text, known in (
        ("--method", options.method, ("fisher", "learned")),
        ("--granularity", options.granularity, (None, "block", "step")),
        ("--reuse", options.reuse, (None, "output", "residual")),
        ("--order", options.order, (None, 0, 1)),
        ("--consistency", options.consistency, ("ssim", "latents")),
    ):
        if text not in known:
            choices = ", ".join(str(k) for k in known if k is not None)
            raise SdfpError(flag, f"{text} is unknown", f"Choose from {choices}.")
    if options.method == "learned" and options.order == 1:
        raise SdfpError("--order 1", "the learned search reuses the last value only", "Use --method fisher.")
    if options.resume and options.method != "learned":
        raise SdfpError(
            "--resume", "only the learned search keeps a state", "Leave it out; this search takes minutes."
        )


def _diffusers_version() -> str:
    import diffusers

    return diffusers.__version__

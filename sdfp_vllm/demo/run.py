"""The demo: one model, the same questions, several ways of decoding, side by side."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.provenance import provenance, weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.demo import picture, report
from sdfp_vllm.demo.figures import by_kind, overall
from sdfp_vllm.demo.methods import METHODS, OWN_DTYPE, PAPER, PLAIN, SDFP, can_run, speculative
from sdfp_vllm.demo.questions import Question, choose
from sdfp_vllm.demo.smollm2 import NAME as SMOLLM2
from sdfp_vllm.demo.smollm2 import smollm2
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure.memory import run_as_memory_allows
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn
from sdfp_vllm.plan.fingerprint import fingerprint, resolve_model_dir
from sdfp_vllm.plan.parcel import PLAN_FILE
from sdfp_vllm.plan.schema import SkipPlan
from sdfp_vllm.plan.store import default_plan_dir, load_plan
from sdfp_vllm.planner.engine_setup import stored_dtype

DEMO_METHODS = tuple(m for m in METHODS if m != PAPER)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. Questions go one at a time (batch 1), greedy.

    Attributes:
        model: Folder or Hugging Face id; None for the demo's own, SmolLM2-135M-Instruct.
        questions: A file in Spec-Bench's format; None for the project's own.
        dtype: Of the target; None for float32 on a CPU, the checkpoint's on a GPU.
        draft: A smaller model, for vLLM's draft_model.
    """

    model: str | None = None
    questions: Path | None = None
    per_kind: int = 2
    new_tokens: int = 48
    methods: tuple[str, ...] = DEMO_METHODS
    dtype: str | None = None
    draft: str | None = None
    seed: int = 0
    eager: bool = False
    out: Path = Path("out")


def run_demo(settings: DemoSettings, console: Console) -> list[dict[str, Any]]:
    """Makes the plan if it is missing, runs every method, prints, and saves demo.json and demo.png in `settings.out`.

    Raises:
        SdfpError: If a setting is out of range, the model or the questions cannot be had, or an engine fails.
    """
    _check(settings)
    began = time.time()
    if settings.model is None:
        with console.status("Fetching SmolLM2-135M-Instruct (first run only)"):
            folder = smollm2()
    else:
        folder = resolve_model_dir(settings.model)
    name = settings.model or str(folder)
    dtype = settings.dtype or (stored_dtype(folder) if torch.cuda.is_available() else "float32")
    asked = choose(
        load_tokenizer(folder), file=settings.questions, per_kind=settings.per_kind, seed=settings.seed
    )
    methods = [
        m
        for m in DEMO_METHODS
        if m in settings.methods
        and can_run(m, settings.draft)
        and not (m == OWN_DTYPE and stored_dtype(folder) == dtype)
    ]
    plan = plan_for(folder, dtype, settings.eager, console) if SDFP in methods else None
    specs = engine_specs(folder, asked, methods, dtype, settings)
    measured, in_turns = _run_all(specs, plan.extra_bytes if plan else 0, console)

    rows = overall(measured, plan)
    kinds = by_kind([q.kind for q in asked], measured)
    shown = SMOLLM2 if settings.model is None else Path(name).name
    title = (
        f"{shown}, {dtype}, "
        f"{'eager' if settings.eager else 'compiled'}: {len(asked)} questions x {settings.new_tokens} tokens, greedy, batch 1"
    )
    report.print_rows(console, title, rows)
    report.print_kinds(console, kinds)
    if plan:
        report.print_promise(console, plan, rows)
    order = (
        "Engines took turns, question by question"
        if in_turns
        else "Engines ran one after the other (little memory)"
    )
    console.print(f"{order}.")
    drawn = picture.save(settings.out / "demo.png", title, rows, kinds)
    save_results(
        settings.out / "demo.json",
        {
            "title": title,
            "weights": weights_of(name, folder),
            "rows": rows,
            "kinds": kinds,
            "engines_took_turns": in_turns,
            "settings": asdict(settings) | {"model": shown, "out": settings.out.name},
            "plan": plan.model_dump(
                include={"view", "extra_bytes", "num_speculative_tokens", "prediction", "made"}, mode="json"
            )
            if plan
            else None,
            "start_seconds": {m: r.start_seconds for m, r in measured.items()},
            "provenance": provenance(),
            "wall_seconds": time.time() - began,
        },
    )
    saved = "demo.json and demo.png" if drawn else "demo.json (no picture: matplotlib is not installed)"
    console.print(f"Saved {saved} in {settings.out}; {time.time() - began:.0f} s in all.")
    return rows


def plan_for(folder: Path, dtype: str, eager: bool, console: Console) -> SkipPlan:
    """The plan of a model from its default place; made first where there is none for this dtype.

    Without `sdfp plan`'s check on the engine: the demo is one. Where costs say that drafts cannot pay the plan is
    made all the same, and the table shows it.
    """
    identity = fingerprint(folder)
    place = default_plan_dir(identity)
    if (place / PLAN_FILE).is_file():
        plan = load_plan(place, expected=identity)
        if plan.costs and plan.costs.dtype == dtype:
            return plan
    from sdfp_vllm.planner.job import make_plan

    console.print(f"No plan for this model in {dtype} yet: making it.")
    return make_plan(str(folder), dtype=dtype, eager=eager, run_check=False, anyway=True, console=console)


def engine_specs(
    folder: Path, asked: list[Question], methods: list[str], dtype: str, settings: DemoSettings
) -> dict[str, EngineSpec]:
    """One engine for each method; SDFP is asked each question twice, without copies and with."""
    plans = {SDFP: default_plan_dir(fingerprint(folder))} if SDFP in methods else {}
    turns = [Turn(prompts=[q.ids], max_tokens=settings.new_tokens) for q in asked]
    twice = [t.model_copy(update={"copies": copies}) for t in turns for copies in (False, True)]
    return {
        method: EngineSpec(
            model=str(folder),
            turns=twice if method == SDFP else turns,
            warm_up=asked[0].ids,
            speculative=speculative(method, plans, settings.draft),
            ignore_eos=True,  # an answer of one token has no speed
            seed=None,  # a seed would fix the draft lengths
            dtype=stored_dtype(folder) if method == OWN_DTYPE else dtype,
            engine={
                "max_model_len": max(len(q.ids) for q in asked) + settings.new_tokens + 32,
                "enforce_eager": settings.eager,
                "enable_prefix_caching": False,
            },
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        for method in methods
    }


def _run_all(
    specs: dict[str, EngineSpec], copies: int, console: Console
) -> tuple[dict[str, Measurement], bool]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    names = list(specs)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(1 + len(s.turns) for s in specs.values()))
        step = lambda i, done: progress.update(task, description=names[i], completed=done)  # noqa: E731
        measured, in_turns = run_as_memory_allows(list(specs.values()), copies, step)
    return dict(zip(names, measured, strict=True)), in_turns


def _check(s: DemoSettings) -> None:
    for flag, value, low in (("--per-kind", s.per_kind, 1), ("--new-tokens", s.new_tokens, 2)):
        if value < low:
            raise SdfpError(flag, f"is {value}", f"Give at least {low}.")
    if unknown := set(s.methods) - set(DEMO_METHODS):
        raise SdfpError(
            "--methods", f"{', '.join(sorted(unknown))} is unknown", f"Choose from {', '.join(DEMO_METHODS)}."
        )
    if PLAIN not in s.methods:
        raise SdfpError("--methods", "plain is missing", "Every figure is relative to it: add it.")

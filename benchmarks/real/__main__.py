"""Real models, asked real questions: plain vLLM in two dtypes, SDFP, and its rivals, in turns.

    python benchmarks/real MODEL --questions FILE.jsonl [--draft MODEL] [--provenance TEXT] [--out FILE]

Every engine is asked the same questions through the model's chat template, greedy: one at a time, then four and eight at
a time, then some of them one at a time at temperature 0.7. SDFP answers each twice: with drafts of the model alone, and
with copies from the context, its default. The paper's method (whole layers by FIT, full precision) has a plan of its own.
Engines that memory does not hold at once run in groups; every group has a plain one, which the others are held against.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from engines import Asked, engine_specs, methods_at_hand
from figures import rows_of, table
from rich.console import Console

from sdfp_vllm.fit.calibration import read_chats
from sdfp_vllm.fit.job import make_plan
from sdfp_vllm.machine import processor
from sdfp_vllm.measure import EngineSpec, Measurement, run_engine, run_engines
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.results_file import save_results
from sdfp_vllm.source_tree import git_sha
from sdfp_vllm.tokenizer import load_tokenizer

_OWN_BYTES = 2 << 30  # of an engine beside its weights


def main() -> None:
    asked = _arguments()
    console = Console(stderr=True)
    model = Path(asked.model)
    questions = [
        ids.tolist() for ids in read_chats(asked.questions, load_tokenizer(model), asked.count, asked.seed)
    ]
    plans = {"sdfp": asked.work / "plan", "paper": asked.work / "paper"}
    settings: dict[str, Any] = dict(dtype=asked.dtype, eager=asked.eager, console=console)
    if not (plans["sdfp"] / "plan.json").is_file():
        make_plan(str(model), out=plans["sdfp"], **settings)
    if asked.paper and not (plans["paper"] / "plan.json").is_file():
        make_plan(
            str(model),
            out=plans["paper"],
            selector="fit",
            precision="full",
            head="full",
            run_check=False,
            **settings,
        )
    plan = load_plan(plans["sdfp"])
    methods = [
        m
        for m in methods_at_hand(asked.draft is not None)
        if (m != "paper" or asked.paper) and (asked.methods is None or m in ("plain", *asked.methods))
    ]
    specs = engine_specs(
        methods,
        Asked(model, questions, asked.tokens, asked.batches, asked.sampled, asked.dtype, asked.eager),
        plans,
        asked.draft,
        plan.num_speculative_tokens,
    )
    in_turns = True
    measured: dict[str, list[tuple[Measurement, Measurement]]] = {}
    for group in _groups(specs, model, plan.extra_bytes):
        with console.status(f"Running {', '.join(group)}"):
            wanted = [specs[m] for m in group]
            fits = len(group) == 1 or sum(_size(specs[m], model, plan.extra_bytes) for m in group) <= _room()
            ran = run_engines(wanted) if fits else [run_engine(spec) for spec in wanted]  # else not in turns
            in_turns = in_turns and fits
            results = dict(zip(group, ran, strict=True))
        for method in group:
            measured.setdefault(method, []).append((results[method], results["plain"]))
    rows = rows_of(specs, measured, plan)
    content = {
        "date": str(date.today()),
        # Names without folders: where a model lies on this machine is nobody else's business.
        "command": " ".join(["python", "benchmarks/real", *map(_name, sys.argv[1:])]),
        "model": model.name,
        "provenance": asked.provenance,
        "questions": f"{len(questions)} of {Path(asked.questions).name}, seed {asked.seed}, {asked.tokens} tokens each",
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "vllm": measured["plain"][0][0].vllm_version,
        "torch": torch.__version__,
        "in_turns": in_turns,
        "engine": "eager" if asked.eager else "compiled",
        "dtype": asked.dtype,
        "git_sha": git_sha(),
        "plan": plan.model_dump(
            mode="json",
            include={"view", "extra_bytes", "num_speculative_tokens", "prediction", "check", "costs", "made"},
        ),
        "rows": rows,
    }
    if asked.out:
        save_results(asked.out, content)
    Console(width=160).print(table(rows))


def _groups(specs: dict[str, EngineSpec], model: Path, extra: int) -> list[list[str]]:
    """Engines that memory holds at once, "plain" in each group; two at least, which else run one after the other."""
    groups: list[list[str]] = []
    for name in (n for n in specs if n != "plain"):
        together = [*groups[-1], name] if groups else []
        if not groups or sum(_size(specs[n], model, extra) for n in together) > _room():
            groups.append(["plain"])
        groups[-1].append(name)
    return groups or [["plain"]]


def _size(spec: EngineSpec, model: Path, extra: int) -> float:
    """Bytes of an engine, while it loads."""
    stored = sum(f.stat().st_size for f in model.glob("*.safetensors"))
    drafts = extra if (spec.speculative or {}).get("method") == "sdfp" else 0
    return 1.7 * stored * (2 if spec.dtype == "float32" else 1) + _OWN_BYTES + drafts


def _room() -> float:
    return 0.9 * psutil.virtual_memory().available


def _name(argument: str) -> str:
    return Path(argument).name if argument.startswith("/") else argument


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--questions", required=True, help="jsonl with turns, messages or prompt")
    parser.add_argument("--draft", help="a smaller model for vLLM's draft_model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=lambda s: [int(b) for b in s.split(",")], default=[1, 4, 8])
    parser.add_argument("--sampled", type=int, default=4, help="questions also asked at temperature 0.7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--methods", type=lambda s: s.split(";"), help="only these, beside plain; separated by semicolons"
    )
    parser.add_argument("--provenance", default="", help="where the weights come from, for the results file")
    parser.add_argument("--work", type=Path, default=Path("out/real"), help="folder for the plans")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    asked.work = asked.work / Path(asked.model).name
    return asked


if __name__ == "__main__":
    main()

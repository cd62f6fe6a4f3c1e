"""Real models, asked real questions: plain vLLM in two dtypes, SDFP, and its rivals, in turns.

    make bench                                        # SmolLM2-135M-Instruct, the project's own questions
    python -m benchmarks.real MODEL --questions FILE.jsonl [--draft MODEL] [--out FILE]

Every engine is asked the same questions through the model's chat template, greedy: some one at a time,
others four at a time (`--batches 1,4,8`: and eight), others one at a time at temperature 0.7; none twice, for suffix decoding
remembers what it answered. SDFP answers each twice: with drafts of the model alone, and
with copies from the context, its default. The paper's method (whole layers by FIT, full precision) has a plan of its own.
Engines that memory does not hold at once run in groups; every group has a plain one, which the others are held against.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.real.engines import Asked, engine_specs
from benchmarks.real.figures import kinds_of, rows_of, table
from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.machine import processor
from sdfp_vllm.common.provenance import weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.demo.methods import METHODS, PAPER, PLAIN, SDFP, can_run
from sdfp_vllm.demo.questions import choose
from sdfp_vllm.demo.smollm2 import smollm2
from sdfp_vllm.measure.memory import fit_together, run_as_memory_allows
from sdfp_vllm.measure.spec import EngineSpec, Measurement
from sdfp_vllm.plan.fingerprint import resolve_model_dir
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.planner.job import make_plan


def main() -> None:
    asked = _arguments()
    console = Console(stderr=True)
    model = resolve_model_dir(asked.model) if asked.model else smollm2()
    work = asked.work / model.name
    needed = Asked.needed(asked.batches, asked.each, asked.sampled)
    questions = choose(load_tokenizer(model), file=asked.questions, per_kind=needed, seed=asked.seed)
    if len(questions) < needed:
        sys.exit(f"{needed} questions are needed, there are {len(questions)}: ask fewer (--each, --sampled)")
    questions = questions[:needed]
    plans = {SDFP: work / "plan", PAPER: work / "paper"}
    settings: dict[str, Any] = dict(dtype=asked.dtype, eager=asked.eager, console=console)
    if not (plans[SDFP] / "plan.json").is_file():
        make_plan(str(model), out=plans[SDFP], run_check=asked.check, **settings)
    if asked.paper and not (plans[PAPER] / "plan.json").is_file():
        own = dict(selector="fit", precision="full", head="full", run_check=False, anyway=True)
        make_plan(str(model), out=plans[PAPER], **own, **settings)
    plan = load_plan(plans[SDFP])
    methods = [
        m
        for m in METHODS
        if can_run(m, asked.draft)
        and (m != PAPER or asked.paper)
        and (asked.methods is None or m in (PLAIN, *asked.methods))
    ]
    prompts = [q.ids for q in questions]
    specs = engine_specs(
        methods,
        Asked(
            model,
            prompts,
            asked.tokens,
            asked.batches,
            asked.each,
            asked.sampled,
            asked.dtype,
            asked.eager,
        ),
        plans,
        asked.draft,
    )
    in_turns = True
    runs: dict[str, list[tuple[Measurement, Measurement]]] = {}
    for group in _groups(specs, plan.extra_bytes):
        with console.status(f"Running {', '.join(group)}"):
            ran, together = run_as_memory_allows([specs[m] for m in group], plan.extra_bytes)
            in_turns = in_turns and together
        results = dict(zip(group, ran, strict=True))
        for method in group:
            runs.setdefault(method, []).append((results[method], results[PLAIN]))
    rows = rows_of(specs, runs, plan)
    kinds = [q.kind for q in questions]
    content = {
        "date": str(date.today()),
        # Names without folders: where a model lies on this machine is nobody else's business.
        "command": " ".join(["python", "-m", "benchmarks.real", *map(_name, sys.argv[1:])]),
        "model": model.name,
        "weights": asked.provenance or weights_of(asked.model or str(model), model),
        "questions": {
            "from": Path(asked.questions).name if asked.questions else "the project's own",
            "kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "seed": asked.seed,
            "new_tokens": asked.tokens,
        },
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "vllm": runs[PLAIN][0][0].vllm_version,
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
        "kinds": kinds_of(specs, runs, kinds),
    }
    if asked.out:
        save_results(asked.out, content)
    Console(width=160).print(table(rows))


def _groups(specs: dict[str, EngineSpec], copies: int) -> list[list[str]]:
    """Engines that memory holds at once, plain vLLM in each group; two at least, which else run one after the other."""
    groups: list[list[str]] = []
    for name in (n for n in specs if n != PLAIN):
        together = [*groups[-1], name] if groups else []
        if not groups or not fit_together([specs[n] for n in together], copies):
            groups.append([PLAIN])
        groups[-1].append(name)
    return groups or [[PLAIN]]


def _name(argument: str) -> str:
    return Path(argument).name if argument.startswith("/") else argument


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--questions", type=Path, help="jsonl with turns, messages or prompt; default: the project's own")  # fmt: skip
    parser.add_argument("--draft", help="a smaller model for vLLM's draft_model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument(
        "--each", type=int, default=8, help="questions for each batch size; none is asked twice"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batches", type=lambda s: [int(b) for b in s.split(",")], default=[1, 4])
    parser.add_argument("--sampled", type=int, default=3, help="questions asked at temperature 0.7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--check", action=argparse.BooleanOptionalAction, default=True, help="plan with its check"
    )
    parser.add_argument(
        "--methods", type=lambda s: s.split(";"), help="only these, beside plain; separated by semicolons"
    )
    parser.add_argument("--provenance", default="", help="where the weights come from, for the results file")
    parser.add_argument("--work", type=Path, default=Path("out/real"), help="folder for the plans")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

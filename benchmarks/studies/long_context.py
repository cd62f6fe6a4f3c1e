"""Long contexts on a real model: plain vLLM, drafts over the whole context, drafts over a window of it, and n-grams.

    python -m benchmarks.studies.long_context MODEL [--windows 512,1024] [--contexts 1024,2048,4096,8192] [--out FILE]

Documents are the Python standard library's sources (or --documents). A context has room for the prompt, the answer and
a few drafts behind it. Every engine continues the same ones, greedy, in turns: so many at a time as --batches says. A prompt is put
into the prefix cache by a turn before, which is not counted; then time runs from the first token to the last. SDFP drafts
with the model alone, and in a turn of its own with copies from the context. All engines are in memory at once, each with
room for the longest context times the largest batch; --methods takes fewer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.machine import processor
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.demo.figures import row
from sdfp_vllm.measure.engines import run_engines
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn, TurnMeasurement
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.planner.calibration import load_calibration
from sdfp_vllm.planner.job import make_plan
from sdfp_vllm.planner.window_search import kv_gigabytes

_SPARE = 64  # positions behind an answer, for drafts
_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


@dataclass(frozen=True)
class Cell:
    """Contexts of one length, so many at a time."""

    context: int
    batch: int

    def asked(self, documents: list[list[int]], tokens: int) -> list[list[list[int]]]:
        """Prompts, in groups that are asked at once."""
        prompts = [d[: self.context - tokens - _SPARE] for d in documents]
        return [prompts[i : i + self.batch] for i in range(0, len(prompts) - self.batch + 1, self.batch)]


def main() -> None:
    asked = _arguments()
    console = Console(stderr=True)
    model = Path(asked.model)
    plan = asked.plan or asked.work / model.name / "plan"
    if not (plan / "plan.json").is_file():
        make_plan(str(model), out=plan, dtype=asked.dtype, eager=asked.eager, console=console)
    calibration = load_calibration(
        asked.documents,
        load_tokenizer(model),
        sequences=asked.count,
        length=max(asked.contexts),
        seed=asked.seed,
    )
    cells = [Cell(context, batch) for context in asked.contexts for batch in asked.batches]
    groups = [(c, g) for c in cells for g in c.asked(calibration.ids.tolist(), asked.tokens)]
    speculative: dict[str, dict[str, Any] | None] = {"plain": None}
    for window in ("none", *asked.windows):
        name = "sdfp, whole context" if window == "none" else f"sdfp, window {window}"
        speculative[name] = {"method": "sdfp", "model": str(plan), "window": window}
    speculative["ngram"] = _NGRAM
    names = [n for n in speculative if n == "plain" or asked.methods is None or n in asked.methods]
    specs = {n: _spec(model, speculative[n], [g for _, g in groups], asked) for n in names}
    with console.status(f"Running {', '.join(names)}"):
        measured = dict(zip(names, run_engines(list(specs.values())), strict=True))
    rows = [
        row
        for cell in cells
        for name in names
        for row in _rows(name, cell, [i for i, (of, _) in enumerate(groups) if of == cell], measured)
    ]
    content = {
        "date": str(date.today()),
        # Names without folders: where a model lies on this machine is nobody else's business.
        "command": " ".join(["python", "-m", "benchmarks.studies.long_context", *map(_name, sys.argv[1:])]),
        "model": model.name,
        "documents": f"{asked.count} from {_name(asked.documents or 'the standard library')}, seed {asked.seed}, "
        f"{asked.tokens} tokens each",
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "vllm": measured["plain"].vllm_version,
        "torch": torch.__version__,
        "engine": "eager" if asked.eager else "compiled",
        "dtype": asked.dtype,
        "kv_cache_dtype": asked.kv_cache_dtype,
        "kv_bytes_per_token": measured["plain"].kv_bytes_per_token,
        "git_sha": git_sha(),
        "plan": load_plan(plan).model_dump(
            mode="json", include={"view", "extra_bytes", "num_speculative_tokens"}
        ),
        "rows": rows,
    }
    if asked.out:
        save_results(asked.out, content)
    Console(width=160).print(_table(rows))


def _spec(
    model: Path, speculative: dict[str, Any] | None, groups: list[list[list[int]]], asked: argparse.Namespace
) -> EngineSpec:
    """A turn that fills the prefix cache before two that count; copies mean something to SDFP alone."""
    turns = []
    for prompts in groups:
        common = dict(prompts=prompts, batch=len(prompts))
        turns.append(Turn(max_tokens=1, **common))
        turns += [Turn(max_tokens=asked.tokens, copies=copies, **common) for copies in (False, True)]
    room = max(asked.contexts) * max(asked.batches)
    return EngineSpec(
        model=str(model),
        turns=turns,
        warm_up=groups[0][0],
        speculative=speculative,
        ignore_eos=True,
        seed=None,  # a seed would fix the draft lengths
        dtype=asked.dtype,
        engine={
            "max_model_len": max(asked.contexts),
            "max_num_seqs": max(asked.batches),
            "enforce_eager": asked.eager,
            "enable_prefix_caching": True,
            "kv_cache_dtype": asked.kv_cache_dtype,
        },
        environment={"VLLM_CPU_KVCACHE_SPACE": str(kv_gigabytes(model, asked.dtype, room))},
    )


def _rows(name: str, cell: Cell, groups: list[int], measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    """A row for each kind of turn of a method, against plain vLLM's in the same turns."""
    kinds = {"": [1], " with copies": [2]} if name.startswith("sdfp") else {"": [1, 2]}
    return [
        _row(
            name + kind,
            cell,
            *([measured[n].turns[3 * g + j] for g in groups for j in of] for n in (name, "plain")),
        )
        for kind, of in kinds.items()
    ]


def _row(
    name: str, cell: Cell, ours: Sequence[TurnMeasurement], plain: Sequence[TurnMeasurement]
) -> dict[str, Any]:
    steps = sum(steps * count for t in ours for _, _, steps, count in t.paced)
    return row(name, list(zip(ours, plain, strict=True))) | {
        "context": cell.context,
        "batch": cell.batch,
        "draft_ms": 1e3 * sum(t.draft_seconds for t in ours) / steps if steps else None,
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    titles = (
        "context", "batch", "method", "tokens/s", "ratio", "least-most", "accepted", "a round", "draft ms", "identical"
    )  # fmt: skip
    made = Table(*titles)
    for r in rows:
        made.add_row(
            str(r["context"]),
            str(r["batch"]),
            r["method"],
            f"{r['tokens_per_second']:.2f}",
            f"{r['ratio']:.2f}x",
            f"{r['ratio_least']:.2f}-{r['ratio_most']:.2f}",
            *(
                "-" if r[key] is None else f"{r[key]:.{digits}f}"
                for key, digits in (("acceptance_rate", 3), ("tokens_per_round", 2), ("draft_ms", 1))
            ),
            f"{r['identical_texts']} of {r['texts']}",
        )
    return made


def _name(argument: str) -> str:
    return Path(argument).name if argument.startswith("/") else argument


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--documents", help="a text file, .jsonl or dataset; default: the standard library")
    parser.add_argument("--plan", type=Path, help="a plan's folder; default: one is made in --work")
    parser.add_argument("--windows", type=numbers, default=[1024])
    parser.add_argument("--contexts", type=numbers, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--batches", type=numbers, default=[1, 4])
    parser.add_argument("--count", type=int, default=4, help="documents")
    parser.add_argument("--tokens", type=int, default=128, help="that each is continued by")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of all engines, plain vLLM's too")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--methods", type=lambda s: s.split(";"), help="only these, beside plain; by semicolons"
    )
    parser.add_argument("--work", type=Path, default=Path("out/long_context"), help="folder for the plan")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

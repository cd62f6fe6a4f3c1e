"""Long contexts on a real model: plain vLLM, drafts over the whole context, drafts over a window of it, and n-grams.

    python -m benchmarks.studies.long_context MODEL [--window 512] [--contexts 1024,2048,4096,8192] [--out FILE]

Documents are, in turns, the Python standard library's sources and this project's documentation (or --documents). What is asked of them
(kinds of requests): to be continued, summarised, and two questions about them; the latter three as chats. Cells are contexts of one length:
each kind one at a time, and kinds mixed, so many at a time as --together says. A context has room for the prompt, the answer and a few drafts
behind it.

Every engine answers the same requests, greedy, in turns. A prompt is put into the prefix cache by a turn before, which is not
counted; then time runs from the first token to the last. At the shortest context that turn before is the prefill of a whole prompt, and `with_prefill` has it
(for another length, give that alone). One SDFP engine drafts with the model alone over the whole context, with the window, and both again with copies from the context; with the window
pacing decides by request who sees it. All engines are in memory at once; --methods takes fewer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.provenance import provenance, weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.demo.figures import row
from sdfp_vllm.measure.engines import run_engines
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn, TurnMeasurement
from sdfp_vllm.plan.store import find_plan
from sdfp_vllm.planner.calibration import load_calibration
from sdfp_vllm.planner.long_texts import LongText
from sdfp_vllm.planner.window_search import kv_gigabytes

_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
_PLAIN, _HALF, _SDFP = "plain", "plain, bfloat16", "sdfp"
CONTINUED = "continued"
_ASKED = {
    CONTINUED: "",
    "summary": "Summarise the text above in five sentences.",
    "question": "Which names does the text above define or explain first, and what is each of them for?",
    "second question": "What does the end of the text above say? Quote a passage of it and explain it.",
}
_MIXED = "mixed"
# The SDFP engine's turns, by the name of the row: whether with the window, and with copies.
_VIEWS = {
    "sdfp, whole context": (False, False),
    "sdfp, window": (True, False),
    "sdfp, whole context, copies": (False, True),
    "sdfp, window, copies": (True, True),
}


@dataclass(frozen=True)
class Request:
    """One document and what is asked of it."""

    document: int
    kind: str


@dataclass(frozen=True)
class Group:
    """Requests that are asked at once, in contexts of one length."""

    context: int
    kind: str
    requests: tuple[Request, ...]

    @property
    def cell(self) -> tuple[int, str, int]:
        return self.context, self.kind, len(self.requests)


def groups_of(contexts: Sequence[int], documents: int, together: Sequence[int]) -> list[Group]:
    """By context, in the order given; the first finds nothing in the prefix cache."""
    made = []
    for context in contexts:
        for kind in list(_ASKED)[:3]:
            made += [Group(context, kind, (Request(d, kind),)) for d in range(documents)]
        # Neighbours differ in kind, and as long as there are others in document.
        every = [
            Request((i + d) % documents, kind) for d in range(documents) for i, kind in enumerate(_ASKED)
        ]
        for count in together:
            made.append(Group(context, _MIXED, tuple(every[i % len(every)] for i in range(count))))
    return made


def prompts_of(tokenizer: Any, documents: list[list[int]], group: Group, answer: int) -> list[list[int]]:
    """Token ids of a group's requests."""
    prompts = []
    for request in group.requests:
        document, task = documents[request.document], _ASKED[request.kind]
        text = LongText.asking(tokenizer, document, task) if task else LongText(document)
        prompts.append(text.prompt(group.context, answer))
    return prompts


def main() -> None:
    asked = _arguments()
    console = Console(stderr=True)
    plan = find_plan(str(asked.model), asked.plan).plan
    tokenizer = load_tokenizer(asked.model)
    documents = list(_documents(tokenizer, asked))
    groups = groups_of(asked.contexts, len(documents), asked.together)
    asked_ids = [prompts_of(tokenizer, documents, g, asked.tokens) for g in groups]
    specs = {n: s for n, s in _specs(asked, asked_ids).items() if _is_asked(n, asked.methods)}
    with console.status(f"Running {', '.join(specs)}") as status:

        def on_step(engine: int, done: int) -> None:
            status.update(f"{list(specs)[engine]}: {done} steps of engines done, {len(groups)} groups")

        measured = dict(zip(specs, run_engines(list(specs.values()), on_step), strict=True))
    rows = rows_of(groups, measured)
    if asked.out:
        content = provenance() | {
            "model": asked.model.name,
            "weights": weights_of(str(asked.model), asked.model),
            "documents": f"{len(documents)}, {asked.tokens} tokens after each, seed {asked.seed}",
            "window": asked.window,
            "engine": "eager" if asked.eager else "compiled",
            "threads": torch.get_num_threads(),
            "dtype": asked.dtype,
            "kv_cache_dtype": asked.kv_cache_dtype,
            "kv_bytes_per_token": measured[_PLAIN].kv_bytes_per_token,
            "plan": plan.model_dump(mode="json", include={"view", "extra_bytes", "num_speculative_tokens"}),
            "rows": rows,
        }
        save_results(asked.out, content)
    Console(width=170).print(_table(rows))


def _is_asked(name: str, methods: Sequence[str] | None) -> bool:
    return name == _PLAIN or methods is None or name in methods


def _documents(tokenizer: Any, asked: argparse.Namespace) -> Iterator[list[int]]:
    """Token ids, each as long as the longest context."""
    common: dict[str, Any] = dict(length=max(asked.contexts), seed=asked.seed)
    if asked.documents:
        yield from load_calibration(asked.documents, tokenizer, sequences=asked.count, **common).ids.tolist()
        return
    pages = Path(__file__).parents[2] / "docs"
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / "documentation.txt"
        joined.write_text("\n\n".join(p.read_text() for p in sorted(pages.rglob("*.md"))))
        sources = load_calibration(None, tokenizer, sequences=(asked.count + 1) // 2, **common).ids.tolist()
        own = load_calibration(str(joined), tokenizer, sequences=asked.count // 2 or 1, **common).ids.tolist()
    mixed = [d for pair in zip(sources, own, strict=False) for d in pair] + sources[len(own) :]
    yield from mixed[: asked.count]


def _specs(asked: argparse.Namespace, prompts: list[list[list[int]]]) -> dict[str, EngineSpec]:
    """Engines by method. Each has a turn that fills the prefix cache, then those that count: SDFP's four, the others' one."""
    ours = {"method": "sdfp", "window": asked.window} | ({"model": str(asked.plan)} if asked.plan else {})
    speculative: dict[str, dict[str, Any] | None] = {
        _PLAIN: None,
        _HALF: None,
        _SDFP: ours,
        "ngram": _NGRAM,
    }
    # Chats and what is continued begin differently: a document is in the cache twice; each request has an end of its own.
    room = max(asked.contexts) * 2 * asked.count + 512 * max([1, *asked.together])
    specs = {}
    for name, config in speculative.items():
        dtype = "bfloat16" if name == _HALF else asked.dtype
        turns: list[Turn | None] = []
        for ids in prompts:
            common: dict[str, Any] = dict(prompts=ids, batch=len(ids))
            turns.append(Turn(max_tokens=1, **common))
            if name == _SDFP:
                turns += [
                    Turn(
                        max_tokens=asked.tokens,
                        window=asked.window if windowed else "none",
                        copies=copies,
                        **common,
                    )
                    for windowed, copies in _VIEWS.values()
                ]
            else:
                turns += [Turn(max_tokens=asked.tokens, **common), None, None, None]
        specs[name] = EngineSpec(
            model=str(asked.model),
            turns=turns,
            warm_up=prompts[0][0][-32:],  # not a beginning of what is timed: that would be in the cache
            speculative=config,
            seed=None,  # a seed would fix the draft lengths
            dtype=dtype,
            engine={
                "max_model_len": max(asked.contexts),
                "max_num_seqs": max([1, *asked.together]),
                "enforce_eager": asked.eager,
                "enable_prefix_caching": True,
                "kv_cache_dtype": asked.kv_cache_dtype,
            },
            environment={"VLLM_CPU_KVCACHE_SPACE": str(kv_gigabytes(asked.model, dtype, room))},
        )
    return specs


def rows_of(groups: Sequence[Group], measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    """A row for each cell and method, against plain vLLM's turns of the same groups; `against_bfloat16` where that ran.

    `with_prefill`, of documents that are continued at the shortest context: the ratio of times that hold the prefill.
    """
    made = {name: _by_group(m, 4 if name == _SDFP else 1) for name, m in measured.items()}
    variants = {
        row_name: (name, j)
        for name in made
        for row_name, j in (zip(_VIEWS, range(1, 5), strict=True) if name == _SDFP else [(name, 1)])
    }
    rows = []
    for cell in dict.fromkeys(g.cell for g in groups):
        of = [i for i, g in enumerate(groups) if g.cell == cell]
        for row_name, (name, j) in variants.items():
            ours, plain, half = (
                [made[n][i][k] for i in of] if n in made else None
                for n, k in ((name, j), (_PLAIN, 1), (_HALF, 1))
            )
            assert ours is not None and plain is not None
            if not all(map(_has_speed, (*ours, *plain, *(half or ())))):
                continue
            steps = sum(s * count for t in ours for _, _, s, count in t.paced)
            figures = row(row_name, list(zip(ours, plain, strict=True)))
            context, kind, batch = cell
            figures |= {"context": context, "kind": kind, "batch": batch}
            figures["draft_ms"] = 1e3 * sum(t.draft_seconds for t in ours) / steps if steps else None
            if half:
                figures["against_bfloat16"] = row("", list(zip(ours, half, strict=True)))["ratio"]
            if (
                kind == CONTINUED and context == groups[0].context
            ):  # longer ones find a beginning in the cache
                read, plainly = (sum(made[n][i][0].seconds for i in of) for n in (name, _PLAIN))
                spent, plain_spent = (sum(t.decode_seconds for t in turns) for turns in (ours, plain))
                figures["prefill_seconds"] = read / len(of)
                figures["with_prefill"] = (plainly + plain_spent) / (read + spent)
            rows.append(figures)
    return rows


def _has_speed(turn: TurnMeasurement) -> bool:
    """Whether an answer has a second token: a model may end its chat at once."""
    return any(len(ids) > 1 for ids in turn.token_ids)


def _by_group(measurement: Measurement, counted: int) -> list[list[TurnMeasurement]]:
    """An engine's turns by group: the one that fills the cache, then those that count."""
    size = 1 + counted
    return [measurement.turns[i : i + size] for i in range(0, len(measurement.turns), size)]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    titles = (
        "context", "kind", "batch", "method", "tokens/s", "ratio", "least-most", "to bf16", "with prefill",
        "accepted", "a round", "draft ms", "identical",
    )  # fmt: skip
    made = Table(*titles)
    for r in rows:
        made.add_row(
            str(r["context"]),
            r["kind"],
            str(r["batch"]),
            r["method"],
            f"{r['tokens_per_second']:.2f}",
            f"{r['ratio']:.2f}x",
            f"{r['ratio_least']:.2f}-{r['ratio_most']:.2f}",
            *(
                "-" if r.get(key) is None else f"{r[key]:.{digits}f}"
                for key, digits in (
                    ("against_bfloat16", 2),
                    ("with_prefill", 2),
                    ("acceptance_rate", 3),
                    ("tokens_per_round", 2),
                    ("draft_ms", 1),
                )
            ),
            f"{r['identical_texts']} of {r['texts']}",
        )
    return made


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",") if n]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--documents", help="a text file, .jsonl or dataset, instead of sources and documentation"
    )
    parser.add_argument(
        "--plan", type=Path, help="a plan's folder; default: the model's own, as `sdfp plan` left it"
    )
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--contexts", type=numbers, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--together", type=numbers, default=[4, 8], help="batches of mixed requests")
    parser.add_argument("--count", type=int, default=2, help="documents")
    parser.add_argument("--tokens", type=int, default=64, help="that each answer has at most")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of all engines, plain vLLM's too")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--methods", type=lambda s: s.split(";"), help="only these, beside plain; by semicolons"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

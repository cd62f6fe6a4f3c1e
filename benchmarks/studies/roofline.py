"""Predicts, on paper, what a low-precision view of a target gives on a GPU: by model, batch, context, precision and window.

    python -m benchmarks.studies.roofline [--out FILE] [--check FILE ...]

Nothing is run: every figure is a prediction, to be scored by the first run on such a machine. A step over R rows takes

    max(bytes / (e B), flops / (e F)) + layers * launch + step

with B the memory's bandwidth, F the peak of matrix products, e the share of both that kernels reach (0.8 and 0.6), `launch` what a
layer adds whatever it computes (0 inside a CUDA graph that covers the step, else kernel starts), and `step` what the engine adds. Bytes
are weights at the view's precision, once (of a mixture of experts, those that R rows reach), and the K/V of each request's context. A round of
k drafts yields (1 - a^(k+1)) / (1 - a) tokens with a token accepted a of the time; k is the best of 0 to 8.

`--check` compares with committed runs of `long_context.py`: from each model's figures at its shortest context, batch 1, the formula
takes bandwidth and overhead, and predicts all the others.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.common.source_tree import git_sha

MEMORY_SHARE, COMPUTE_SHARE = 0.8, 0.6
MOST_DRAFTS = 8
SINKS = 4


@dataclass(frozen=True)
class Chip:
    """A machine.

    Attributes:
        gigabytes_s: Peak bandwidth of its memory.
        teraflops: Peak of dense products in bfloat16 (on a CPU in the target's dtype); twice that in 8 bits and fewer.
        launch_us: What a layer of a target's step adds.
        draft_launch_us: The same in a draft step.
        step_ms, draft_step_ms: What the engine adds to a step: scheduling, sampling, metadata.
    """

    name: str
    gigabytes_s: float
    teraflops: float
    launch_us: float = 0.0
    draft_launch_us: float = 0.0
    step_ms: float = 0.8
    draft_step_ms: float = 0.35


@dataclass(frozen=True)
class Shape:
    """A decoder. `experts` of the MLP's `mlp` parameters each, of which a token uses `used`; 1 of 1 is a dense one."""

    name: str
    layers: int
    attention: int
    mlp: int
    head: int
    kv_values: int
    experts: int = 1
    used: int = 1
    wide: int = 2

    @classmethod
    def of(
        cls,
        name: str,
        layers: int,
        hidden: int,
        heads: int,
        kv_heads: int,
        dim: int,
        inner: int,
        vocab: int,
        **more: int,
    ) -> Shape:
        """From the numbers of a config.json; `wide` is the bytes of a value as it is served."""
        attention = hidden * dim * (2 * heads + 2 * kv_heads)
        return cls(name, layers, attention, 3 * hidden * inner, vocab * hidden, 2 * kv_heads * dim, **more)

    def weights(self, rows: int, share: float = 1.0) -> float:
        """Parameters that a step over `rows` rows reads, in units of the target's; experts are not rounded here."""
        reached = self.experts * (1.0 - (1.0 - self.used / self.experts) ** rows)
        experts = self.mlp * reached * (share if self.experts == 1 else 1.0)
        return self.layers * (self.attention * share + experts) + self.head * share

    @property
    def products(self) -> float:
        """Multiplications of a row."""
        return self.layers * (self.attention + self.mlp * self.used) + self.head


@dataclass(frozen=True)
class View:
    """What drafts: bytes of a weight over those of the target's (scales included), acceptance, and how much context is read."""

    name: str
    share: float
    acceptance: float
    window: int | None = None

    def seen(self, context: int) -> int:
        return context if self.window is None else min(context, self.window + SINKS)


# Acceptance a token: what was measured (docs/results/real-models.md for int8; a research fork on 8B and 32B models for the rest).
FULL = View("full precision", 1.0, 1.0)
VIEWS = (
    FULL,
    View("fp8", 0.5, 0.99),
    View("int8", 0.5, 0.97),
    View("int4, groups of 128", 0.266, 0.95),
    View("full precision, window 512", 1.0, 0.97, 512),
    View("fp8, window 512", 0.5, 0.96, 512),
    View("int4, window 512", 0.266, 0.92, 512),
)
CHIPS = (
    Chip("L4", 300, 121),
    Chip("A100", 2039, 312),
    Chip("H100", 3350, 990),
    Chip("H200", 4800, 990),
    Chip("B200", 8000, 2250),
)
SHAPES = (
    Shape.of("1B (Llama 3.2)", 16, 2048, 32, 8, 64, 8192, 128256),
    Shape.of("8B (Llama 3.1)", 32, 4096, 32, 8, 128, 14336, 128256),
    Shape.of("32B (Qwen3)", 64, 5120, 64, 8, 128, 25600, 151936),
    Shape.of("70B (Llama 3.1)", 80, 8192, 64, 8, 128, 28672, 128256),
    Shape.of("30B-A3B (Qwen3)", 48, 2048, 32, 4, 128, 768, 151936, experts=128, used=8),
)
MEMORY_GB = {"L4": 24, "A100": 80, "H100": 80, "H200": 141, "B200": 192}
BATCHES, CONTEXTS = (1, 4, 16, 64), (1024, 4096, 16384, 32768)


def step_ms(chip: Chip, shape: Shape, batch: int, rows: int, context: int, view: View | None = None) -> float:
    """One forward of `rows` rows for each of `batch` requests after `context` tokens; of the target, or of a view."""
    share, seen = (1.0, context) if view is None else (view.share, view.seen(context))
    total = batch * rows
    kv = batch * seen * shape.layers * shape.kv_values
    moved = (shape.weights(total, share) + kv) * shape.wide
    faster = 2.0 if share <= 0.5 and shape.experts == 1 else 1.0
    work = 2.0 * total * shape.products
    seconds = max(
        moved / (chip.gigabytes_s * 1e9 * MEMORY_SHARE),
        work / (chip.teraflops * 1e12 * COMPUTE_SHARE * faster),
    )
    launch, step = (
        (chip.launch_us, chip.step_ms) if view is None else (chip.draft_launch_us, chip.draft_step_ms)
    )
    return 1e3 * seconds + 1e-3 * launch * shape.layers + step


def tokens(acceptance: float, drafts: int) -> float:
    """Expected tokens of a round (Leviathan et al., arXiv 2211.17192, equation 1)."""
    return sum(acceptance**i for i in range(drafts + 1))


def speedup(chip: Chip, shape: Shape, view: View, batch: int, context: int, drafts: int) -> float:
    """Tokens per second over plain decoding's."""
    plain = step_ms(chip, shape, batch, 1, context)
    round_ms = step_ms(chip, shape, batch, drafts + 1, context)
    round_ms += drafts * step_ms(chip, shape, batch, 1, context, view)
    return tokens(view.acceptance, drafts) * plain / round_ms


def best(chip: Chip, shape: Shape, view: View, batch: int, context: int) -> tuple[float, int]:
    """The best speedup and its number of drafts; (1, 0) where none pays."""
    gains = [(speedup(chip, shape, view, batch, context, k), k) for k in range(1, MOST_DRAFTS + 1)]
    return max([*gains, (1.0, 0)])


def gigabytes(shape: Shape, batch: int, context: int) -> float:
    """Weights and K/V, for what fits."""
    weights = shape.layers * (shape.attention + shape.experts * shape.mlp) + shape.head
    return 1e-9 * shape.wide * (weights + batch * context * shape.layers * shape.kv_values)


def predictions() -> list[dict[str, Any]]:
    """Every chip, model, batch and context that fits: plain decoding, and by view (speedup, drafts a round)."""
    rows: list[dict[str, Any]] = []
    for chip, shape, batch, context in itertools.product(CHIPS, SHAPES, BATCHES, CONTEXTS):
        if gigabytes(shape, batch, context) > 0.9 * MEMORY_GB[chip.name]:
            continue
        plain = 1e3 * batch / step_ms(chip, shape, batch, 1, context)
        gains = {view.name: best(chip, shape, view, batch, context) for view in VIEWS[1:]}
        rows.append(
            {"chip": chip.name, "model": shape.name, "batch": batch, "context": context}
            | {"plain tokens/s": round(plain, 1)}
            | {name: f"{gain:.2f}x ({k})" for name, (gain, k) in gains.items()}
        )
    return rows


# A research fork of vLLM (V1 runner, H100, 8B): what it measured end to end, and the overheads that its first row implies.
FORK = (
    ("int4 at 2k", VIEWS[3], 1, 2048, 1.215),
    ("int4 with a window at 16k", replace(VIEWS[6], acceptance=0.92), 1, 16384, 1.42),
    ("int4 with a window at 16k, batch 8", replace(VIEWS[6], acceptance=0.92), 8, 16384, 1.8),
    ("window alone at 2k", VIEWS[4], 1, 2048, 1.01),
)


def fork() -> list[dict[str, Any]]:
    """The fork's figures against the formula, with the draft's overhead taken from the first of them."""
    h100, eight = CHIPS[2], SHAPES[1]
    low, high = 0.0, 20.0
    for _ in range(60):  # the overhead of a draft step at which the first row comes out
        middle = (low + high) / 2
        chip = replace(h100, draft_step_ms=middle)
        low, high = (
            (middle, high) if best(chip, eight, FORK[0][1], 1, 2048)[0] > FORK[0][4] else (low, middle)
        )
    chip = replace(h100, draft_step_ms=low)
    rows = []
    for name, view, batch, context, measured in FORK:
        gain, k = best(chip, eight, view, batch, context)
        ideal, _ = best(h100, eight, view, batch, context)
        rows.append(
            {
                "what": name,
                "measured": measured,
                "predicted": round(gain, 2),
                "drafts": k,
                "predicted_with_graphs": round(ideal, 2),
                "draft_overhead_ms": round(low, 2),
            }
        )
    return rows


def check(file: Path) -> list[dict[str, Any]]:
    """A run of `long_context.py` against the formula, fitted to its shortest context at batch 1.

    Fitted: how fast K/V is read, from plain decoding at the shortest and the longest context at batch 1; and the rest of
    a step, from the shortest. Predicted: plain decoding elsewhere, and speedups from the time of a draft step at the shortest context.
    """
    run = json.loads(file.read_text())
    kv = run["kv_bytes_per_token"]
    rows = {(r["method"], r["context"], r["batch"]): r for r in run["rows"]}
    contexts = sorted({r["context"] for r in run["rows"]})
    short, long = contexts[0], contexts[-1]

    def plain_ms(context: int, batch: int) -> float:
        return 1e3 * batch / rows["plain", context, batch]["tokens_per_second"]

    per_byte = (plain_ms(long, 1) - plain_ms(short, 1)) / (kv * (long - short))
    fixed = plain_ms(short, 1) - per_byte * kv * short
    made = []
    for (method, context, batch), r in rows.items():
        if method == "plain" and (context, batch) not in ((short, 1), (long, 1)):
            predicted = fixed + per_byte * kv * context * batch
            made.append(
                _scored(file, method, context, batch, "ms a step", predicted, plain_ms(context, batch))
            )
        # At larger batches requests stop drafting at different steps, and the file may count steps by tokens.
        alone = method.startswith("sdfp") and "copies" not in method and batch == 1 and context != short
        if r.get("draft_ms") and alone:
            window = int(method.rsplit(" ", 1)[1]) if "window" in method else None
            seen = View("", 1.0, 1.0, window).seen(context)
            first = rows[method, short, 1]["draft_ms"]
            at_first = View("", 1.0, 1.0, window).seen(short)
            predicted = first + per_byte * kv * (seen * batch - at_first)
            made.append(_scored(file, method, context, batch, "ms a draft step", predicted, r["draft_ms"]))
    return made


def _scored(
    file: Path, method: str, context: int, batch: int, unit: str, predicted: float, measured: float
) -> dict[str, Any]:
    return {
        "file": file.name,
        "method": method,
        "context": context,
        "batch": batch,
        "unit": unit,
        "predicted": round(predicted, 1),
        "measured": round(measured, 1),
        "off": round(predicted / measured - 1.0, 3),
    }


def _shown(title: str, rows: Iterable[dict[str, Any]]) -> Table:
    rows = list(rows)
    table = Table(*rows[0], title=title)
    for r in rows:
        table.add_row(*map(str, r.values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", type=Path, nargs="*", default=[], help="runs of long_context.py")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    console = Console(width=160)
    made, forked = predictions(), fork()
    checked = [row for file in asked.check for row in check(file)]
    shown = [
        r for r in made if r["chip"] == "H100" and r["batch"] in (1, 16) and r["context"] in (1024, 16384)
    ]
    console.print(_shown("Predicted on an H100 (nothing was run)", shown))
    console.print(_shown("A research fork's measurements against the formula", forked))
    if checked:
        console.print(_shown("This project's runs against the formula", checked))
    if asked.out:
        names = " ".join(["--check", *(file.name for file in asked.check)]) if asked.check else ""
        save_results(
            asked.out,
            {
                "command": f"python -m benchmarks.studies.roofline {names}".strip(),
                "kind": "predicted: nothing was run",
                "git_sha": git_sha(),
                "predictions": made,
                "fork": forked,
                "checked": checked,
            },
        )


if __name__ == "__main__":
    main()

"""The benchmark that the project is held to: one run, every method, batch sizes, prompts of several kinds.

    make bench-toy                   # python -m benchmarks.toy
    python -m benchmarks.toy --repeats 1 --batches 1 8 --shapes      # a quick look

All engines are vLLM's, eager on this machine's CPU and in float32 (the random checkpoints in bfloat16 where this CPU
multiplies that), one process each, and take turns: turn after turn the same prompts go to each of them, so that a
machine that drifts slows all alike. A ratio is decoding speed (tokens after each request's first, over their time)
over plain vLLM's in the same turn; shown are the median over the repeats, and the least and the most. Other repeats
have other prompts. Plain vLLM and SDFP are asked up to three times, as time allows; their rivals once, and not with
noise or a queue.

The demo target is cost-scaled and its redundancy is trained in; the other shapes are random checkpoints
whose acceptance is dialled (benchmarks/studies/dialled.py): synthetic workloads. `bound` is what a method's own
acceptance and rounds allow at the costs of the forwards measured before the run, all else free; `efficiency` is
the ratio over it.

Not run unless asked for: `--methods plain sdfp "sdfp, fixed length"`, SDFP at its plan's length in every round.

Writes benchmarks/results/latest.json, .md and .png. Take a quiet machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common.published import RESULTS
from benchmarks.toy.engines import (
    DIALLED,
    DRAFT_MODEL,
    FIXED,
    NGRAM,
    PLAIN,
    SDFP,
    SUFFIX,
    dialled_model,
    draft_cost,
    fitting,
    half_if_fast,
    methods_at_hand,
    spec,
    speculative,
)
from benchmarks.toy.figures import headline, least_time, row
from benchmarks.toy.pages import picture, tables
from benchmarks.toy.workloads import KINDS, NOISE, Cell, cells, turn
from sdfp_vllm.common.progress import stages
from sdfp_vllm.common.provenance import provenance
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.measure.engines import run_engines
from sdfp_vllm.plan.schema import SkipPlan
from sdfp_vllm.plan.show import parts
from sdfp_vllm.planner.job import make_plan
from tests.toy.scaled import demo_cache, demo_draft, demo_target

DEMO = "demo target, cost-scaled to 0.32B"
WARM_UP = list(range(300, 332))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3, help="of plain vLLM and SDFP, as time allows")
    parser.add_argument(
        "--minutes",
        type=float,
        default=25,
        help="after which the demo target's repeats end; one is run to its end",
    )
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--methods", nargs="+", default=[PLAIN, SDFP, DRAFT_MODEL, NGRAM, SUFFIX])
    parser.add_argument("--shapes", nargs="*", choices=list(DIALLED), default=list(DIALLED))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    began = time.time()
    console = Console(stderr=True)
    result: dict[str, Any] = {
        "cost_scaled": True,
        "settings": vars(asked) | {"out": None},
        "headline": {},
        "models": {},
        "notes": {},
        "left_out": sorted(set(asked.methods) - set(methods_at_hand(asked.methods))),
        "provenance": provenance(),
    }
    with tempfile.TemporaryDirectory(prefix="sdfp-bench-") as folder:
        for shape in asked.shapes:
            shape_part(shape, asked, Path(folder), console, result)
            write(result, asked.out, began)
        # Last, for it takes what time is left.
        demo_part(asked, Path(folder), console, result, until=began + 60 * asked.minutes)
        write(result, asked.out, began)
    console.print(f"Wrote {asked.out / 'latest.json'}, latest.md, latest.png; {time.time() - began:.0f} s")


def demo_part(
    asked: argparse.Namespace, folder: Path, console: Console, result: dict[str, Any], until: float
) -> None:
    """The demo target in every cell with every method; the plan is made anew, on the machine as it is now."""
    with console.status("Preparing the cost-scaled demo models (first run only)"):
        target, draft = demo_target(), demo_draft()
    plan = make_plan(
        str(target),
        out=folder / "plan",
        dtype="float32",
        score_form="diagonal",
        eager=True,
        run_check=False,
        console=console,
    )
    result["plan"] = plan.model_dump(exclude={"scores", "curve"}, mode="json")
    methods = methods_at_hand(asked.methods)
    costs = draft_cost(draft) if DRAFT_MODEL in methods else None
    rows = compare(
        target, folder / "plan", plan, methods, cells(asked.batches), asked, console,
        draft=draft, costs=costs, until=until,
    )  # fmt: skip
    result["models"] = {DEMO: rows} | result["models"]
    result["headline"] = headline(rows)
    result["notes"][DEMO] = (
        f"Cost-scaled, redundancy trained in. {parts(plan.view)} of {plan.fingerprint.num_layers} layers draft; "
        f"the plan's length is {plan.num_speculative_tokens}; draft_model is a separate 2-layer model, "
        "its weights beside the target's."
    )


def shape_part(
    shape: str, asked: argparse.Namespace, folder: Path, console: Console, result: dict[str, Any]
) -> None:
    """A real model's shape with random weights and dialled acceptance."""
    dtype = half_if_fast()
    with console.status(f"Preparing a random checkpoint of the shape {shape}"):
        model, plan, where = dialled_model(shape, demo_cache() / "dialled", dtype)
    name = f"{shape}, random weights"
    noise = [Cell(NOISE, b, 0.0, b) for b in asked.batches if b in (1, 8)]
    methods = fitting([m for m in (PLAIN, SDFP, FIXED, NGRAM) if m in asked.methods], model, dtype)
    kind = str(dtype).removeprefix("torch.")
    result["models"][name] = compare(
        model, where, plan, methods, noise, asked, console, dtype=kind, repeats=min(asked.repeats, 2)
    )
    result["notes"][name] = (
        f"Synthetic: random weights in {kind}, {parts(plan.view)} of {plan.fingerprint.num_layers} layers at full "
        f"strength, the others at {DIALLED[shape]['scale']}; prompts of random tokens."
        + (
            " Texts may differ from plain decoding's in this precision, as in vLLM."
            if dtype.itemsize < 4
            else ""
        )
    )


def compare(
    model: Path,
    where: Path,
    plan: SkipPlan,
    methods: list[str],
    chosen: list[Cell],
    asked: argparse.Namespace,
    console: Console,
    *,
    dtype: str = "float32",
    repeats: int | None = None,
    until: float = float("inf"),
    draft: Path | None = None,
    costs: Any = None,
) -> list[dict[str, Any]]:
    """Rows of every method in every cell. Rivals are asked once, and in cells of KINDS alone where there are any.

    Args:
        until: When, on `time.time`, repeats end; the first is run to its end.
    """
    repeats = repeats or asked.repeats
    compared = sum(cell.kind in KINDS for cell in chosen) or len(chosen)  # they stand first
    turns = [
        turn(cell, model, asked.prompt_tokens, asked.new_tokens, seed)
        for seed in range(repeats)
        for cell in chosen
    ]
    k = plan.num_speculative_tokens
    specs = [
        spec(
            model,
            turns if method in (PLAIN, SDFP, FIXED) else turns[:compared],
            WARM_UP,
            speculative(method, str(where), k, draft),
            dtype=dtype,
        )
        for method in methods
    ]
    with stages(console) as bar, bar.step("Engines", sum(1 + len(s.turns) for s in specs)) as advance:
        done, what = 0, "starting"

        def on_step(engine: int, step: int) -> None:
            nonlocal done
            advance(step - done, f"{methods[engine]}: {what}")
            done = step

        def goes_on(turn: int) -> bool:
            nonlocal what
            what = chosen[turn % len(chosen)].name
            return turn < len(chosen) or time.time() < until

        measured = dict(zip(methods, run_engines(specs, on_step, goes_on), strict=True))
    least = {method: least_time(method, plan, costs) for method in methods}
    rows = []
    for c, cell in enumerate(chosen):
        of_cell = {m: r.turns[c :: len(chosen)] for m, r in measured.items()}
        plain = of_cell[PLAIN]
        rows += [
            row(cell, m, mine, plain[: len(mine)], least[m], least[PLAIN])
            for m, mine in of_cell.items()
            if mine
        ]
    return rows


def write(result: dict[str, Any], out: Path, began: float) -> None:
    """Saves what there is."""
    result["wall_seconds"] = time.time() - began
    save_results(out / "latest.json", result)
    (out / "latest.md").write_text(tables(result))
    picture(result, out / "latest.png")


if __name__ == "__main__":
    main()

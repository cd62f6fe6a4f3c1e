"""Pacing against the best fixed draft length in hindsight, on traffic that changes on the way.

    python -m benchmarks.studies.regret MODEL [--questions FILE] [--lengths 2,3,4,6] [--long 4096,8000] [--out FILE]

One sequence of requests, in phases: chats of one kind after another, one at a time; then long documents to be continued; then chats of
all kinds four at a time; then the first kind again. One SDFP engine answers each group of requests with every draft length in turn, fixed (0 is
drafting nothing), and paced, without copies and with: engines in processes of their own differ by more than what is compared. A turn before fills
the prefix cache, and the order of the turns rotates. What is learned in fixed turns pacing does not see. Speeds are of decoding, from a request's
first token to its last. The regret is the share of time a token, summed over the phases, that pacing takes beyond the fixed length with the least, and, which no
fixed setting could do, beyond the best of each phase. Plain vLLM answers too, for its texts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.provenance import provenance, weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.demo.questions import choose
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure.engines import run_engines
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn, TurnMeasurement
from sdfp_vllm.plan.store import find_plan, load_plan
from sdfp_vllm.planner.calibration import load_calibration
from sdfp_vllm.planner.window_search import kv_gigabytes

PACED, DEFAULT = "paced, no copies", "paced, as it comes"


@dataclass(frozen=True)
class Phase:
    """Requests of one kind, so many at a time."""

    name: str
    prompts: list[list[int]]
    batch: int = 1


def phases_of(asked: argparse.Namespace, tokenizer: Any) -> list[Phase]:
    """The traffic, in order."""
    drawn = choose(tokenizer, file=asked.questions, per_kind=2 * asked.count, seed=asked.seed)
    by_kind: dict[str, list[list[int]]] = {}
    for question in drawn:
        by_kind.setdefault(question.kind, []).append(question.ids)
    # Half of each kind one at a time; no question is asked twice.
    phases = [Phase(kind, prompts[: asked.count]) for kind, prompts in by_kind.items()]
    rest = [p for prompts in by_kind.values() for p in prompts[asked.count :]]
    first = rest[: asked.count]  # of the first kind: the traffic comes back to it
    for length in asked.long:
        ids = load_calibration(
            None, tokenizer, sequences=2, length=length - asked.tokens - 16, seed=asked.seed
        ).ids
        phases.append(Phase(f"continuing {length} tokens", ids.tolist()))
    together = rest[asked.count :]
    count = len(together) // asked.batch * asked.batch
    if not count or len(by_kind[phases[0].name]) < 2 * asked.count:
        raise SdfpError(
            "--count, --batch", "want more questions than there are", "Give less, or other --questions."
        )
    phases.append(Phase(f"all kinds, {asked.batch} at a time", together[:count], asked.batch))
    phases.append(Phase(f"{phases[0].name} again", first))
    return phases


def groups_of(phases: Sequence[Phase]) -> list[tuple[int, list[list[int]]]]:
    """Requests that are asked at once, with the number of their phase."""
    return [
        (n, p.prompts[i : i + p.batch])
        for n, p in enumerate(phases)
        for i in range(0, len(p.prompts), p.batch)
    ]


def settings_of(lengths: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What a turn is set to, by name."""
    fixed = {f"{k} drafts": {"drafts": k, "copies": False} for k in (0, *lengths)}
    return fixed | {PACED: {"copies": False}, DEFAULT: {"copies": True}}


def rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def seconds_of(
    turns: Sequence[TurnMeasurement], groups: Sequence[tuple[int, list[list[int]]]], phases: int
) -> list[float]:
    """Seconds of decoding a token, by phase."""
    spent, tokens = [0.0] * phases, [0] * phases
    for turn, (phase, _) in zip(turns, groups, strict=True):
        spent[phase] += turn.decode_seconds
        tokens[phase] += sum(len(ids) - 1 for ids in turn.token_ids)
    return [s / n for s, n in zip(spent, tokens, strict=True)]


def whole_of(turns: list[TurnMeasurement]) -> TurnMeasurement:
    """All turns as one."""
    return Measurement(turns=turns, start_seconds=0.0, kv_bytes_per_token=None, vllm_version="").whole


def rows_of(
    measured: dict[str, list[TurnMeasurement]],
    groups: Sequence[tuple[int, list[list[int]]]],
    phases: int,
    want: list[list[int]],
) -> tuple[list[dict[str, Any]], str]:
    """The results' rows, and the name of the best fixed setting.

    Args:
        measured: The turns of each setting, one a group of requests.
        want: Plain vLLM's texts.
    """
    spent = {name: seconds_of(made, groups, phases) for name, made in measured.items()}
    fixed = [name for name in spent if name not in (PACED, DEFAULT)]
    total = {name: sum(times) for name, times in spent.items()}  # every phase weighs the same
    best = min(fixed, key=total.__getitem__)
    hindsight = [min(spent[name][i] for name in fixed) for i in range(phases)]
    rows = []
    for name, times in spent.items():
        whole = whole_of(measured[name])
        rows.append(
            {
                "method": name,
                "tokens_per_second": [round(1 / t, 2) for t in times],
                "regret_by_phase": [round(t / h - 1, 3) for t, h in zip(times, hindsight, strict=True)],
                "regret": round(total[name] / total[best] - 1, 4),
                "regret_to_best_of_each_phase": round(total[name] / sum(hindsight) - 1, 4),
                "acceptance_rate": whole.acceptance_rate,
                "tokens_per_round": whole.mean_accepted_length,
                "identical_texts": sum(a == b for a, b in zip(whole.token_ids, want, strict=True)),
                "texts": len(want),
            }
        )
    return rows, best


def main() -> None:
    asked = _arguments()
    model = Path(asked.model)
    tokenizer = load_tokenizer(model)
    plan = str(asked.plan) if asked.plan else find_plan(asked.model).source
    phases = phases_of(asked, tokenizer)
    groups, settings = groups_of(phases), settings_of(asked.lengths)
    order = [rotated(list(settings), g) for g in range(len(groups))]
    turns = [
        turn
        for (_, prompts), names in zip(groups, order, strict=True)
        for turn in (
            Turn(prompts=prompts, batch=len(prompts), max_tokens=1),
            *(
                Turn(prompts=prompts, batch=len(prompts), max_tokens=asked.tokens, **settings[n])
                for n in names
            ),
        )
    ]
    longest = max([*asked.long, 1024]) + 64
    room = longest * max(asked.batch, 2)
    common: dict[str, Any] = dict(
        model=str(model),
        warm_up=phases[0].prompts[0],
        ignore_eos=True,
        dtype=asked.dtype,
        engine={
            "max_model_len": longest,
            "max_num_seqs": asked.batch,
            "enforce_eager": asked.eager,
            "enable_prefix_caching": True,
        },
        environment={"VLLM_CPU_KVCACHE_SPACE": str(kv_gigabytes(model, asked.dtype, room))},
    )
    specs = [
        EngineSpec(
            turns=[Turn(prompts=p, batch=len(p), max_tokens=asked.tokens) for _, p in groups], **common
        ),
        EngineSpec(turns=turns, speculative={"method": "sdfp", "model": plan}, **common),
    ]
    with Console(stderr=True).status(f"{len(turns)} turns"):
        plain, ours = run_engines(specs)
    each = 1 + len(settings)
    measured: dict[str, list[TurnMeasurement]] = {name: [] for name in settings}
    for g, names in enumerate(order):
        for name, turn in zip(names, ours.turns[each * g + 1 : each * (g + 1)], strict=True):
            measured[name].append(turn)
    rows, best = rows_of(measured, groups, len(phases), plain.whole.token_ids)
    Console(width=180).print(_table(rows, phases, best))
    if asked.out:
        save_results(
            asked.out,
            {
                **provenance(),
                "model": model.name,
                "weights": asked.provenance or weights_of(asked.model, model),
                "plan": load_plan(plan).model_dump(mode="json", include={"view", "num_speculative_tokens"}),
                "engine": "eager" if asked.eager else "compiled",
                "dtype": asked.dtype,
                "phases": [{"name": p.name, "requests": len(p.prompts), "batch": p.batch} for p in phases],
                "best_fixed": best,
                "rows": rows,
            },
        )


def _table(rows: Sequence[dict[str, Any]], phases: Sequence[Phase], best: str) -> Table:
    table = Table(
        "method", *(p.name for p in phases), "regret", title=f"tokens/s by phase; best fixed: {best}"
    )
    for r in rows:
        table.add_row(r["method"], *(f"{t:.1f}" for t in r["tokens_per_second"]), f"{r['regret']:+.1%}")
    return table


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",") if n]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--plan", type=Path, help="a plan's folder; default: the model's")
    parser.add_argument("--questions", type=Path, help="in Spec-Bench's format; default: the project's own")
    parser.add_argument("--lengths", type=numbers, default=[2, 3, 4, 6], help="fixed draft lengths")
    parser.add_argument("--long", type=numbers, default=[4096, 8000], help="tokens of long contexts")
    parser.add_argument("--count", type=int, default=2, help="requests of each kind in its phase")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--provenance", default="", help="where the weights come from, for the results file")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

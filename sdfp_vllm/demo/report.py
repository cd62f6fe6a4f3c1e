"""What the demo says: the table, the comparison of plan and measurement, the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.measure import Measurement, TurnMeasurement
from sdfp_vllm.plan.schema import SkipPlan

PLAIN, SDFP, NGRAM, DRAFT_MODEL = "plain", "sdfp", "ngram", "draft_model"
NAMES = {
    PLAIN: "plain decoding",
    SDFP: "SDFP (this project)",
    NGRAM: "vLLM ngram",
    DRAFT_MODEL: "vLLM draft_model",
}


@dataclass(frozen=True)
class Comparison:
    """SDFP as planned and as measured. Speedups are of decoding, prefill left out.

    `bound` is the speedup that the measured acceptance allows at the plan's measured costs of
    drafting and verifying, were everything else free (the yardstick of arXiv 2601.11580);
    `efficiency` is measured over bound.
    """

    predicted_acceptance: float
    measured_acceptance: float
    predicted_length: float
    measured_length: float
    predicted_speedup: float
    measured_speedup: float
    bound: float | None
    efficiency: float | None


def speedup_bound(plan: SkipPlan, drafted: TurnMeasurement) -> float | None:
    """Plain decoding's time for the same text over the drafting engine's, at the plan's costs; None for a plan without.

    Time is that of the target's forwards and of the draft steps that were run; what the engine adds to a round and to
    a draft step counts as zero. Prompts go one at a time.
    """
    if drafted.paced and plan.pacing:
        later = sum(len(ids) - 1 for ids in drafted.token_ids)
        return later * plan.pacing.verify_ms(1) / plan.pacing.least_ms(drafted.paced)
    costs, k, length = plan.costs, plan.num_speculative_tokens, drafted.mean_accepted_length
    if costs is None or length is None or costs.rows[-1] <= k:
        return None
    drafts_ms = k * costs.step_ms(plan.view.branches, 1)
    return length * costs.target_ms(1) / (costs.target_ms(k + 1) + drafts_ms)


def compare(plan: SkipPlan, plain: Measurement, sdfp: Measurement) -> Comparison:
    """Sets the plan's promise beside what `sdfp` gave on the prompts of `plain`.

    Raises:
        SdfpError: If SDFP drafted nothing.
    """
    drafted = sdfp.whole
    acceptance, length = drafted.acceptance_rate, drafted.mean_accepted_length
    if acceptance is None or length is None:
        raise SdfpError(
            "SDFP", "drafted no token", "Look at the plan with `sdfp show`; it may say 0 draft tokens."
        )
    measured = sdfp.decode_tokens_per_second / plain.decode_tokens_per_second
    bound = speedup_bound(plan, drafted)
    return Comparison(
        predicted_acceptance=plan.prediction.acceptance_rate,
        measured_acceptance=acceptance,
        predicted_length=plan.prediction.mean_accepted_length,
        measured_length=length,
        predicted_speedup=plan.prediction.speedup,
        measured_speedup=measured,
        bound=bound,
        efficiency=measured / bound if bound else None,
    )


def identical(a: Measurement, b: Measurement) -> int:
    """How many prompts got the same tokens from both."""
    return sum(x == y for x, y in zip(a.whole.token_ids, b.whole.token_ids, strict=True))


def rows(results: Mapping[str, Measurement], draft_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One record per method, as in the table and in the results file. `results` must hold plain decoding.

    Args:
        draft_bytes: Weights that a method loads beside the target's, in bytes; 0 where not named.
    """
    plain = results[PLAIN]
    return [
        {
            "method": method,
            "tokens_per_second": m.tokens_per_second,
            "ratio_to_plain": m.tokens_per_second / plain.tokens_per_second,
            "decode_tokens_per_second": m.decode_tokens_per_second,
            "acceptance_rate": m.whole.acceptance_rate,
            "mean_accepted_length": m.whole.mean_accepted_length,
            "extra_weight_bytes": draft_bytes.get(method, 0),
            "kv_bytes_per_token": m.kv_bytes_per_token,
            "identical_texts": identical(m, plain),
            "texts": len(m.whole.texts),
            "engine_start_seconds": m.start_seconds,
        }
        for method, m in results.items()
    ]


def print_table(console: Console, title: str, records: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in (
        "method",
        "tokens/s",
        "ratio",
        "acceptance",
        "tokens/round",
        "extra weights",
        "KV per token",
        "same text",
    ):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    number = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    for r in records:
        kv = r["kv_bytes_per_token"]
        table.add_row(
            NAMES[r["method"]],
            f"{r['tokens_per_second']:.2f}",
            f"{r['ratio_to_plain']:.2f}x",
            number(r["acceptance_rate"], ".3f"),
            number(r["mean_accepted_length"], ".2f"),
            f"{r['extra_weight_bytes'] / 1e6:.0f} MB",
            "-" if kv is None else f"{kv / 1024:.1f} KiB",
            "yes" if r["identical_texts"] == r["texts"] else f"{r['identical_texts']} of {r['texts']}",
        )
    console.print(table)


def print_comparison(console: Console, c: Comparison) -> None:
    table = Table(title="SDFP: planned and measured (decoding only, prefill left out)", title_justify="left")
    for heading in ("", "planned", "measured", "difference"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, planned, measured, form in (
        ("acceptance rate", c.predicted_acceptance, c.measured_acceptance, ".3f"),
        ("tokens per round", c.predicted_length, c.measured_length, ".2f"),
        ("speedup", c.predicted_speedup, c.measured_speedup, ".2f"),
    ):
        table.add_row(
            name, format(planned, form), format(measured, form), format(measured - planned, "+" + form)
        )
    console.print(table)
    if c.bound is None or c.efficiency is None:
        console.print("The plan holds no measured costs, so the bound is unknown.")
    else:
        console.print(
            f"Its own acceptance and the measured cost of drafting and verifying allow at most {c.bound:.2f}x; "
            f"reached {c.measured_speedup:.2f}x, efficiency {c.efficiency:.2f}."
        )


def save_picture(path: Path, title: str, results: Mapping[str, Measurement]) -> bool:
    """Draws tokens/s per method, and acceptance by draft position. Returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, acceptance = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=11)
    colours = {PLAIN: "0.6", SDFP: "tab:blue", NGRAM: "tab:green", DRAFT_MODEL: "tab:orange"}
    plain = results[PLAIN].tokens_per_second
    bars = speed.bar(
        [NAMES[m].replace(" ", "\n", 1) for m in results],
        [r.tokens_per_second for r in results.values()],
        color=[colours[m] for m in results],
    )
    speed.bar_label(
        bars, [f"{r.tokens_per_second:.1f}\n{r.tokens_per_second / plain:.2f}x" for r in results.values()]
    )
    speed.set_ylabel("tokens/s, batch 1")
    speed.margins(y=0.2)
    for method, measured in results.items():
        r = measured.whole
        if r.rounds:
            shares = [n / r.rounds for n in r.accepted_per_position]
            acceptance.plot(
                range(1, len(shares) + 1), shares, "o-", color=colours[method], label=NAMES[method]
            )
    acceptance.set(xlabel="draft position", ylabel="share of rounds that accept it", ylim=(0, 1))
    acceptance.xaxis.get_major_locator().set_params(integer=True)
    if acceptance.lines:
        acceptance.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True


def as_dict(comparison: Comparison | None) -> dict[str, Any] | None:
    return None if comparison is None else asdict(comparison)

"""Are drafts behind a picture accepted as drafts in plain chats are, and does a plan made on pictures choose better?

    python -m benchmarks.captioner CAPTIONER
    python -m benchmarks.studies.captions CAPTIONER [--budgets planned 28] [--prediction FILE] [--out FILE]

CAPTIONER is a toy, a small language model that was taught pictures of handwritten digits: acceptance means something with it, speed does not,
and none is measured. Plans are made with `sdfp plan`'s own job, calibrated on chats that the model makes up ("text") and on chats with
pictures of training digits ("pictures"): as `sdfp plan` makes them by itself ("as planned"), and at full precision with the draft's cost fixed
at fewer layers' ("N layers"), where calibration decides which branches are dropped. Where a plan cannot be made that is written down,
and the others are measured. Pictures of held-out digits, one question each, and a few plain questions are answered by plain vLLM and with each plan,
greedy, eager, float32, DRAFTS drafts a round with the model alone. A prediction of acceptances, by plan, is scored where one is given.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.captioner.chats import write_chats
from benchmarks.captioner.language import messages
from benchmarks.captioner.questions import KINDS, Asked, ask
from benchmarks.common.engine_here import draft_counts, engines_here
from sdfp_vllm.common.provenance import provenance, weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.errors import SdfpError
from sdfp_vllm.plan.schema import SkipPlan
from sdfp_vllm.plan.store import load_plan

DRAFTS = 4
TOKENS = 96  # most in an answer
PLAIN = "no picture"
_CALIBRATION_SEED, _HELD_OUT_SEED = 77, 99
_CHATS = 64  # with pictures, in the calibration file
# The project's own questions were among the plain chats of the training; these were not.
_QUESTIONS = (
    "What is a good name for a cat that sleeps all day?",
    "Explain in two sentences why leaves change colour in autumn.",
    "How do I boil an egg so that the yolk stays soft?",
    "Write a short note to thank a neighbour for watering the plants.",
    "What is the difference between a lake and a pond?",
    "Give me three reasons to learn to swim.",
    "Why do ships float although they are made of steel?",
    "Suggest a simple dinner with rice and beans.",
)


@dataclass(frozen=True)
class Planned:
    """A plan to make: what it is called, and how `sdfp plan` is asked for it."""

    calibrated: str
    budget: str
    requests: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.budget}, {self.calibrated}"


def main() -> None:
    asked = _arguments()
    engines_here()
    from tests.support import vision

    if not vision.usable():  # before transformers is imported, which looks for it once
        raise SystemExit("no torchvision: `make` installs packaging/vision.txt")
    console = Console(stderr=True)
    content: dict[str, Any] = provenance() | {
        "toy": "SmolLM2-135M-Instruct taught pictures of digits, by benchmarks.captioner: no model that anybody uses",
        "model": asked.model.name,
        "weights": weights_of(str(asked.model), asked.model),
        "engine": "vLLM V1, eager, float32, greedy",
        "draft_tokens": DRAFTS,
        "plans": [],
        "not_made": [],
        "rows": [],
    }
    questions = {kind: ask(asked.pictures, _HELD_OUT_SEED + i, kind, True) for i, kind in enumerate(KINDS)}
    requests = _requests(asked.model, questions)
    with console.status("Plain vLLM answers"):
        want, _ = _answers(asked.model, None, requests)
    content["right"] = {kind: _right(want[kind], of) for kind, of in questions.items()}
    content["examples"] = [
        {"kind": k, "question": of[0].question, "answer": want[k][0][0], "right": of[0].answer}
        for k, of in questions.items()
    ] + [{"kind": PLAIN, "question": _QUESTIONS[0], "answer": want[PLAIN][0][0]}]
    for planned in _plans(asked.budgets, asked.work):
        try:
            plan = _plan(asked.model, planned, asked.work)
        except SdfpError as e:
            content["not_made"].append({"plan": planned.name, "reason": str(e)})
            console.print(f"{planned.name}: not made: {e}", markup=False)
            continue
        content["plans"].append(_told(planned, plan))
        got, counts = _answers(asked.model, asked.work / planned.name, requests)
        content["rows"] += [
            _row(planned.name, kind, got[kind], want[kind], counts[kind]) for kind in requests
        ]
        _save(asked, content)
    _save(asked, content)
    console.print(_table(content))


# ---------------------------------------------------------------- plans
def _plans(budgets: Sequence[str], work: Path) -> list[Planned]:
    """In the order in which they are made: pairs that differ in their calibration alone."""
    pictures = write_chats(work / "pictures.jsonl", ask(_CHATS, _CALIBRATION_SEED))
    made = []
    for budget in budgets:
        requests: dict[str, Any] = dict(dtype="float32", eager=True, run_check=False, anyway=True)
        if budget != "planned":
            # The whole head: which tokens a smaller one has would be calibrated as well.
            requests |= dict(precision="full", layers=int(budget), draft_tokens=DRAFTS, head="full")
        name = "as planned" if budget == "planned" else f"{budget} layers"
        made.append(Planned("text", name, requests))
        made.append(Planned("pictures", name, requests | {"calibration": str(pictures)}))
    return made


def _plan(model: Path, planned: Planned, work: Path) -> SkipPlan:
    """Makes the plan, or loads it where an earlier run did."""
    from sdfp_vllm.planner.job import make_plan

    folder = work / planned.name
    if (folder / "plan.json").is_file():
        return load_plan(folder)
    return make_plan(str(model), out=folder, console=Console(stderr=True), **planned.requests)


def _told(planned: Planned, plan: SkipPlan) -> dict[str, Any]:
    """What of a plan is written down."""
    modes = {"attention": plan.view.attention, "mlp": plan.view.mlp}
    return {
        "plan": planned.name,
        "calibration": Path(planned.requests.get("calibration", "chats that the model makes up")).name,
        "skipped": {
            branch: ", ".join(str(i) for i, mode in enumerate(of) if mode == "skip")
            for branch, of in modes.items()
        },
        "branches": Counter(mode for of in modes.values() for mode in of),
        "head": plan.view.head.model_dump(exclude={"sha256"}),
        "predicted_acceptance": plan.prediction.acceptance_rate,
    }


# ---------------------------------------------------------------- engines
def _requests(model: Path, questions: dict[str, list[Asked]]) -> dict[str, list[dict[str, Any]]]:
    """What the engine is asked, by kind."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def prompt(chat: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    made: dict[str, list[dict[str, Any]]] = {
        kind: [
            {"prompt": prompt(messages(one)), "multi_modal_data": {"image": one.picture.image}} for one in of
        ]
        for kind, of in questions.items()
    }
    plain = [{"prompt": prompt([{"role": "user", "content": q}])} for q in _QUESTIONS]
    return made | {PLAIN: plain}


def _answers(
    model: Path, plan: Path | None, requests: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, list[tuple[str, list[int]]]], dict[str, list[float]]]:
    """Texts with their token ids, and rounds, drafts and accepted drafts, by kind."""
    from vllm import SamplingParams

    from sdfp_vllm.engine.inspect_engine import allow_copies, fix_drafts
    from tests.support.engines import engine

    speculative = None if plan is None else {"method": "sdfp", "model": str(plan)}
    answers, counts = {}, {}
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    with engine(model, speculative, limit_mm_per_prompt={"image": 1}) as llm:
        if plan is not None:
            allow_copies(llm, False)
            fix_drafts(llm, DRAFTS)
        for kind, asked in requests.items():
            before = draft_counts(llm) if plan is not None else (0.0, 0.0, 0.0)
            out = llm.generate(asked, sampling, use_tqdm=False)
            answers[kind] = [(o.outputs[0].text, list(o.outputs[0].token_ids)) for o in out]
            if plan is not None:
                counts[kind] = [b - a for a, b in zip(before, draft_counts(llm), strict=True)]
    return answers, counts


# ---------------------------------------------------------------- figures
def _right(answers: Sequence[tuple[str, list[int]]], questions: Sequence[Asked]) -> dict[str, Any]:
    """How many answers are the right one, word for word."""
    right = sum(text == one.answer for (text, _), one in zip(answers, questions, strict=True))
    tokens = sum(len(ids) for _, ids in answers) / len(answers)
    return {
        "questions": len(questions),
        "right": right,
        "share": round(right / len(questions), 3),
        "tokens": round(tokens, 1),
    }


def _row(plan: str, kind: str, got: list[Any], want: list[Any], counts: Sequence[float]) -> dict[str, Any]:
    rounds, drafts, accepted = counts
    return {
        "plan": plan,
        "kind": kind,
        "texts": len(got),
        "identical_texts": sum(ours == plain for ours, plain in zip(got, want, strict=True)),
        "rounds": int(rounds),
        "drafts": int(drafts),
        "accepted": int(accepted),
        "acceptance": round(accepted / drafts, 4),
        "tokens_per_round": round(1 + accepted / rounds, 3),
    }


def over_pictures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Acceptance by plan over all questions about pictures."""
    plans = dict.fromkeys(r["plan"] for r in rows)
    of = {p: [r for r in rows if r["plan"] == p and r["kind"] != PLAIN] for p in plans}
    return {
        p: round(sum(r["accepted"] for r in rs) / sum(r["drafts"] for r in rs), 4) for p, rs in of.items()
    }


def scored(prediction: dict[str, float], measured: dict[str, float]) -> dict[str, Any]:
    """A prediction beside what was measured, for the plans that have both, and its mean absolute error."""
    both = {
        p: {
            "predicted": prediction[p],
            "measured": measured[p],
            "error": round(prediction[p] - measured[p], 4),
        }
        for p in prediction
        if p in measured
    }
    error = round(sum(abs(b["error"]) for b in both.values()) / len(both), 4) if both else None
    return {"by_plan": both, "mean_absolute_error": error}


def _save(asked: argparse.Namespace, content: dict[str, Any]) -> None:
    content["over_pictures"] = over_pictures(content["rows"])
    if asked.prediction:
        content["prediction"] = scored(json.loads(asked.prediction.read_text()), content["over_pictures"])
    if asked.out:
        save_results(asked.out, content)


def _table(content: dict[str, Any]) -> Table:
    kinds = [*KINDS, PLAIN]
    table = Table("plan", *kinds, "pictures", "identical", title="A toy: accepted drafts, tokens a round")
    for plan, all_ in content["over_pictures"].items():
        of = {r["kind"]: r for r in content["rows"] if r["plan"] == plan}
        cells = [f"{of[k]['acceptance']:.3f} {of[k]['tokens_per_round']:.2f}" for k in kinds]
        same, texts = (sum(r[key] for r in of.values()) for key in ("identical_texts", "texts"))
        table.add_row(plan, *cells, f"{all_:.3f}", f"{same} of {texts}")
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the captioner's folder")
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=["planned", "28"],
        help="planned: as `sdfp plan` does by itself; N: N layers",
    )
    parser.add_argument("--pictures", type=int, default=24, help="held out, for each kind of question")
    parser.add_argument("--prediction", type=Path, help="a JSON file: acceptance over pictures, by plan")
    parser.add_argument("--work", type=Path, default=Path("out/captions"), help="folder for plans")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

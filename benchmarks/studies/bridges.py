"""What bridges do to acceptance: tokens a round for keep sets of every size, with each kind of bridge.

    python -m benchmarks.studies.bridges MODEL PLAN [--out benchmarks/results/bridges.json]
    python -m benchmarks.studies.bridges --train-plain FOLDER [--minutes 10]

Layers are kept in the order of PLAN's FIT scores. Bridges are fitted on the target's own greedy text and
judged on other such text, 4 draft tokens a round, as `sdfp plan --bridge` does; nothing is timed. The demo
target was trained to bear skipped layers; `--train-plain` trains one that was not: 8 layers, 2M parameters,
next-token cross-entropy on the same data and nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.plan.bridge import BridgeKind
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.planner.bridges import BridgeFitter
from sdfp_vllm.planner.calibration import load_calibration
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.search import ranked_layers
from sdfp_vllm.planner.stack import DecoderStack, load_target

DRAFT_TOKENS = 4
KINDS: tuple[tuple[BridgeKind, int], ...] = (("bias", 0), ("affine", 0), ("low-rank", 16), ("low-rank", 64))


def compare(model: Path, plan: Path) -> dict[str, Any]:
    """Mean accepted length (tokens a round) by layers kept and kind of bridge."""
    o = PlanOptions()
    stack = DecoderStack(load_target(model, torch.float32))
    prompts = load_calibration(
        None, load_tokenizer(model), sequences=2 * o.text_sequences, length=o.prompt, seed=o.seed + 1
    )
    tried, rest = greedy_continuations(stack, prompts.ids, o.new_tokens).split(o.text_sequences)
    assert rest is not None
    rollout, fitter = DraftRollout(stack, tried), BridgeFitter(stack, rest)
    ranking = ranked_layers(load_plan(plan).scores)
    rows = []
    for size in range(2, stack.num_layers):
        keep = sorted(ranking[:size])
        row: dict[str, Any] = {"kept": keep, "none": tokens_a_round(rollout, keep, None)}
        for kind, rank in KINDS:
            fitted = fitter.fit(keep, kind, rank)
            row[f"{kind} {rank}".removesuffix(" 0")] = tokens_a_round(rollout, keep, fitted.bridges)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "model": model.name,
        "draft_tokens": DRAFT_TOKENS,
        "fitted_tokens": rest.ids.numel(),
        "judged_texts": list(tried.ids.shape),
        "rows": rows,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git_sha": git_sha(),
    }


def tokens_a_round(rollout: DraftRollout, keep: list[int], bridges: Any) -> float:
    runs = rollout.run(keep, DRAFT_TOKENS, bridges=bridges)
    return round(runs.rounds(DRAFT_TOKENS).mean_accepted_length, 3)


def train_plain(out: Path, minutes: float) -> None:
    """Trains and saves the target that nobody taught to skip."""
    from tests.toy.train import Llama, Shape, export, prepare, train

    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, held = prepare(out)
    model = Llama(Shape(128, 384, 4, 2), 8)
    settings = argparse.Namespace(lr=4e-3, seed=0, rows=4, save_every=float("inf"))
    train(model, data, held, settings, minutes * 60, None, print, {}, lambda **state: None)
    export(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("plan", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bridges.json"))
    parser.add_argument("--train-plain", type=Path, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=10)
    asked = parser.parse_args()
    if asked.train_plain:
        train_plain(asked.train_plain, asked.minutes)
        return
    if not asked.model or not asked.plan:
        parser.error("name a model and its plan")
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    results[asked.model.name] = compare(asked.model, asked.plan)
    save_results(asked.out, results)


if __name__ == "__main__":
    main()

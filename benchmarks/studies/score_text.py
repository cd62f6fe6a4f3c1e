"""Which text should Fisher traces be taken on: what the target writes, or the calibration text?

    python -m benchmarks.studies.score_text MODEL [--dtype float32] [--sequences 8] [--out FILE]

Each branch is skipped alone and the draft's first step compared with the full model's on chats that were not scored
(overlap of the two distributions, the chance that a sampled draft is accepted). A score is good if it orders branches as
that loss does: Spearman's rank correlation, for both texts and both forms of the score.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sdfp_vllm.common.checkpoint import load_tokenizer
from sdfp_vllm.common.machine import processor
from sdfp_vllm.common.provenance import weights_of
from sdfp_vllm.common.results_file import save_results
from sdfp_vllm.common.source_tree import git_sha
from sdfp_vllm.plan.fingerprint import resolve_model_dir
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.plan.view import BRANCHES
from sdfp_vllm.planner.first_step import FirstStep
from sdfp_vllm.planner.fisher import fisher_scores
from sdfp_vllm.planner.moves import without
from sdfp_vllm.planner.options import DTYPES, PlanOptions
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.stack import DecoderStack, load_target
from sdfp_vllm.planner.texts import Texts, own_windows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    console = Console(stderr=True)
    options = PlanOptions(dtype=asked.dtype, sequences=asked.sequences, text_sequences=asked.sequences)
    folder = resolve_model_dir(asked.model)
    texts = Texts.read(options, load_tokenizer(folder))
    stack = DecoderStack(load_target(folder, DTYPES[asked.dtype], options.device))
    with console.status("The target writes"):
        text = greedy_continuations(
            stack, texts.ask(stack)[: 2 * asked.sequences], options.new_tokens, lambda n: None
        )
    scored, judged = text.split(asked.sequences)
    assert judged is not None
    ids = {"own": own_windows(scored, asked.sequences), "corpus": texts.corpus()}
    with console.status("Fisher traces"):
        scores = {name: fisher_scores(stack, windows) for name, windows in ids.items()}
    first, whole = FirstStep(DraftRollout(stack, judged)), KeepSet.of(range(stack.num_layers))
    units = [(branch, i) for i in range(stack.num_layers) for branch in BRANCHES]
    losses = []
    with console.status("Skipping each branch alone"):
        for unit in units:
            losses.append(1.0 - first.overlap(without(whole, [unit])))
    rows = []
    for name, of in scores.items():
        for form in ("trace", "diagonal"):
            values = [getattr(getattr(of[i], branch), f"{form}_score") for branch, i in units]
            rows.append(
                {
                    "text": name,
                    "tokens": ids[name].numel(),
                    "form": form,
                    "spearman": spearman(values, losses),
                }
            )
            console.print(f"{name:7} {form:9} {rows[-1]['spearman']:+.2f}")
    content: dict[str, Any] = {
        "date": str(date.today()),
        "model": folder.name,
        "weights": weights_of(asked.model, folder),
        "machine": processor(),
        "git_sha": git_sha(),
        "rows": rows,
        "loss_of_skipping": {f"{b} {i}": round(v, 4) for (b, i), v in zip(units, losses, strict=True)},
    }
    if asked.out:
        save_results(asked.out, content)
    else:
        print(json.dumps(content, indent=1))


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; ties, of which real numbers have few, go by order."""
    ranks = [torch.tensor(x, dtype=torch.float64).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()

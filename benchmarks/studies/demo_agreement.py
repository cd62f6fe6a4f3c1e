"""Measures how redundant the embedded demo target is: the figures in its model card.

    python -m benchmarks.studies.demo_agreement

For FIT-ranked keep sets of growing size, the share of positions where the kept layers alone
choose the full model's token: on held-out text (layers simply removed), and on the model's own
greedy continuations with the full model's K/V for past positions, which is what drafting meets.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import date

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common.published import RESULTS
from sdfp_vllm.planner.calibration import load_calibration
from sdfp_vllm.planner.fisher import fisher_scores
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.search import ranked_layers
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests import toy
from tests.toy.held_out import held_out_prompts

MODEL = toy.MODEL
RESULT = RESULTS / "demo_agreement.json"


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--texts", type=int, default=16)
    p.add_argument("--new-tokens", type=int, default=64)
    a = p.parse_args()
    torch.manual_seed(0)
    stack = DecoderStack(load_target(MODEL, torch.float32, "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with torch.enable_grad():
        ids = load_calibration(None, tokenizer, sequences=16, length=256, seed=0).ids
        scores = fisher_scores(stack, ids)
    held_out = torch.tensor(held_out_prompts(MODEL, count=a.texts, tokens=256, seed=0))
    full = stack.logits(held_out)
    loss = torch.nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).item()
    rollout = DraftRollout(stack, greedy_continuations(stack, held_out[:, :64], a.new_tokens))
    rows = []
    for form in ("trace", "diagonal"):
        ranking = ranked_layers(scores, form)
        for size in (3, 4, 5, 6, 8, 12):
            keep = sorted(ranking[:size])
            same = (stack.logits(held_out, keep).argmax(-1) == full.argmax(-1)).float().mean().item()
            accepted = rollout.run(keep, 1).rounds(1).acceptance[0]
            rows.append(dict(score=form, kept=keep, size=size, held_out=same, own_text=accepted))
    table = Table(
        title=f"Top-1 agreement of kept layers with all {stack.num_layers}; held-out loss {loss:.3f}"
    )
    for name in ("score", "layers", "kept", "held-out text", "own greedy text"):
        table.add_column(name)
    for r in rows:
        table.add_row(
            r["score"], str(r["size"]), str(r["kept"]), f"{r['held_out']:.3f}", f"{r['own_text']:.3f}"
        )
    Console(width=110).print(table)
    sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    RESULT.write_text(
        json.dumps(
            dict(
                argv=sys.argv,
                date=str(date.today()),
                git_sha=sha,
                torch=torch.__version__,
                transformers=transformers.__version__,
                machine=platform.machine(),
                held_out_loss=loss,
                rows=rows,
            ),
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

"""Replays the pacing policy over recorded texts and drafts: what its decisions come to, in a second instead of an hour.

    sdfp plan tests/toy/model -o PLAN
    python -m benchmarks.studies.replay_pacing PLAN                    # 33 tokens a request, as in the suite
    python -m benchmarks.studies.replay_pacing PLAN --new-tokens 129

The toy target writes its greedy texts once, and the layers that draft in the plan draft 16 tokens from every position of
them, at the plan's precisions and with all tokens in the head (a minute on one core). Then requests are served on paper,
with the costs of that plan: in batches that start together (`static`) and with others waiting for every place (`queue`). Shown are tokens a second over plain decoding's, on paper: the
mean over the seeds, the least and the most. Nothing here is a measured speed; `make bench` measures.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.toy.workloads import CODE, COPY, NOISE, PROSE, Cell, turn
from sdfp_vllm.pacing.ngram import latest_longest_match
from sdfp_vllm.pacing.policy import GREEDY, DraftPolicy, Row
from sdfp_vllm.pacing.record import Pacing
from sdfp_vllm.plan.schema import StoredView
from sdfp_vllm.plan.store import load_plan
from sdfp_vllm.planner.bridged_stack import bridging
from sdfp_vllm.planner.head import RolledHead
from sdfp_vllm.planner.rollout import DraftRollout, greedy_continuations
from sdfp_vllm.planner.shared_attention import rollout_attention
from sdfp_vllm.planner.stack import DecoderStack, load_target
from tests.toy.scaled import PACKAGED

LONGEST = 16
REQUESTS = 16  # of each kind and seed
KINDS = (CODE, PROSE, COPY, NOISE)


@dataclass(frozen=True)
class Recorded:
    """One request: its prompt, the target's text, and per position of it the tokens drafted and their confidences."""

    prompt: list[int]
    text: list[int]
    drafts: list[list[int]]
    confidence: list[list[float]]


@torch.no_grad()
def record(view: StoredView, kind: str, seed: int, prompt_tokens: int, new_tokens: int) -> list[Recorded]:
    model = PACKAGED / "model"
    stack = DecoderStack(load_target(model, torch.float32))
    prompts = turn(Cell(kind, REQUESTS, 0.0, REQUESTS), model, prompt_tokens, new_tokens, seed).prompts
    text = greedy_continuations(stack, torch.tensor(prompts), new_tokens + LONGEST)
    head = RolledHead(stack, None, view.head.precision)
    rollout = DraftRollout(stack, text)
    rows = rollout.all_rows()
    rows = rows.select(rows.start < text.first + new_tokens)
    token = text.ids[rows.sequence, rows.start]
    tokens, confidence = [], []
    with bridging(stack, view.branches, None), rollout_attention(stack):
        for j in range(LONGEST):  # unlike in a rollout, a draft that is wrong is drafted on from
            hidden = rollout.hidden(token, rows.start + j, rows)
            logits = torch.cat([head(part) for part in hidden.split(256)]).float()
            top, token = logits.max(-1)
            tokens.append(token)
            confidence.append((top - logits.logsumexp(-1)).exp())
    drafts = torch.stack(tokens, 1).view(REQUESTS, new_tokens, LONGEST).tolist()
    sure = torch.stack(confidence, 1).view(REQUESTS, new_tokens, LONGEST).tolist()
    written = text.ids[:, text.first :].tolist()
    return [Recorded(list(p), t, d, c) for p, t, d, c in zip(prompts, written, drafts, sure, strict=True)]


def serve(
    policy: DraftPolicy, pacing: Pacing, requests: Sequence[Recorded], places: int, new_tokens: int
) -> float:
    """Tokens per millisecond while requests take turns in `places` places, over plain decoding's in as many.

    With more requests than places it ends when the first place stays empty, so that no batch runs out.
    """
    at = [0] * len(requests)  # index of the token given last; the first comes with the prefill
    live, waiting = list(range(places)), list(range(places, len(requests)))
    queued, given, ms = bool(waiting), 0, 0.0
    while live and not (queued and len(live) < places):
        rows = []
        for i in live:
            context = np.array(requests[i].prompt + requests[i].text[: at[i] + 1])
            rows.append(Row(GREEDY, latest_longest_match(context, LONGEST), most=new_tokens - 2 - at[i]))
        round = policy.begin(rows)
        while round.goes_on():
            step = round.steps
            round.saw([requests[i].confidence[at[i]][step] for i in live])
        accepted = []
        for i, row in zip(live, rows, strict=True):
            text = requests[i].text[at[i] + 1 :]
            drafts = row.match.tokens if row.copies and row.match else requests[i].drafts[at[i]]
            right = next((j for j in range(row.drafts) if drafts[j] != text[j]), row.drafts)
            accepted.append(right)
            if row.match:
                policy.learn_copying(row.match, text[: right + 1])
            at[i] += right + 1
            given += right + 1
        ms += round.ms
        policy.settle(round, accepted, [row.drafts for row in rows])
        stay = [i for i in live if at[i] < new_tokens - 1]
        came, waiting = waiting[: places - len(stay)], waiting[places - len(stay) :]
        policy.places.observe(len(stay), len(live) - len(stay), len(came))
        live = stay + came
    plain = given / pacing.plain_rate(places) if queued else (new_tokens - 1) * pacing.plain_ms(places)
    return plain / ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="a plan's folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=33)
    asked = parser.parse_args()
    plan = load_plan(asked.plan)
    pacing = plan.pacing
    assert pacing is not None
    texts = {
        (kind, seed): record(plan.view, kind, seed, asked.prompt_tokens, asked.new_tokens)
        for kind in KINDS
        for seed in range(asked.seeds)
    }

    def static(policy: DraftPolicy, kind: str, batch: int, seed: int) -> float:
        requests = texts[kind, seed][: max(batch, 2)]
        parts = [requests[i : i + batch] for i in range(0, len(requests), batch)]
        return statistics.harmonic_mean([serve(policy, pacing, p, batch, asked.new_tokens) for p in parts])

    def queue(policy: DraftPolicy, kind: str, batch: int, seed: int) -> float:
        others = [r for s in range(asked.seeds) for r in texts[kind, (seed + s) % asked.seeds]]
        return serve(policy, pacing, others, batch, asked.new_tokens)

    for name, scenario in (("static", static), ("queue", queue)):
        show(name, asked.batches, asked.seeds, DraftPolicy(pacing, LONGEST), scenario)


def show(
    name: str,
    batches: Sequence[int],
    seeds: int,
    policy: DraftPolicy,
    scenario: Callable[[DraftPolicy, str, int, int], float],
) -> None:
    """One policy meets everything in turn, as an engine's does."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for seed in range(seeds):
        for kind in KINDS:
            for batch in batches:
                ratios.setdefault((kind, batch), []).append(scenario(policy, kind, batch, seed))
    print(f"\n| {name} | " + " | ".join(f"batch {b}" for b in batches) + " |")
    print("|---" * (len(batches) + 1) + "|")
    for kind in KINDS:
        cells = [ratios[kind, b] for b in batches]
        print(
            f"| {kind} | "
            + " | ".join(f"{statistics.mean(c):.2f} ({min(c):.2f}-{max(c):.2f})" for c in cells)
            + " |"
        )


if __name__ == "__main__":
    main()

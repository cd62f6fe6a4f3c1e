"""What an engine drafts, held against what the offline job computes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from sdfp_vllm.plan.bridge import Bridge
from sdfp_vllm.plan.bridge_file import Run
from sdfp_vllm.plan.keep import KeepSet
from sdfp_vllm.planner.bridged_stack import bridging
from sdfp_vllm.planner.rollout import Continuations, DraftRollout
from sdfp_vllm.planner.stack import DecoderStack
from tests.support.engines import runner, tokens

K, NEW = 3, 16  # drafts a round, tokens an answer
Keep = KeepSet | list[int]
Bridges = Mapping[Run, Bridge] | None


def drafts_of(llm: Any, prompts: list[list[int]]) -> tuple[list[list[list[int]]], list[dict[int, list[int]]]]:
    """Greedy answers one request at a time, and per request what was drafted from each start position."""
    drafter = runner(llm).drafter
    propose, seen = drafter.propose, {}

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = inspect.signature(propose).bind(*args, **kwargs).arguments
        last = given.get("token_indices_to_sample")
        if last is None:
            last = given["common_attn_metadata"].query_start_loc[1:] - 1
        out = propose(*args, **kwargs)
        seen[int(given["target_positions"][last][0]) + 1] = out[0].tolist()
        return out

    drafter.propose = spy
    answers, rounds = [], []
    for prompt in prompts:
        seen = {}
        answers += tokens(llm, [prompt], max_tokens=NEW)
        rounds.append(seen)
    drafter.propose = propose
    return answers, rounds


@torch.no_grad()
def draft_offline(stack: DecoderStack, keep: Keep, bridges: Bridges, ids: list[int]) -> list[int]:
    """K drafts after `ids`, over the full model's K/V of all but the last of them, one token at a time."""
    cache = DynamicCache(config=stack.config)
    stack.model(input_ids=torch.tensor([ids[:-1]]), past_key_values=cache, use_cache=True)
    drafted: list[int] = []
    with bridging(stack, keep, bridges):
        for j in range(K):
            fed = drafted[-1] if drafted else ids[-1]
            out = stack.model(
                input_ids=torch.tensor([[fed]]),
                position_ids=torch.tensor([[len(ids) - 1 + j]]),
                past_key_values=cache,
                use_cache=True,
            )
            drafted.append(int(out.logits[0, -1].argmax()))
    return drafted


def assert_drafts_are_offline(
    stack: DecoderStack,
    keep: Keep,
    bridges: Bridges,
    prompts: Sequence[list[int]],
    answers: Sequence[list[list[int]]],
    rounds: Sequence[dict[int, list[int]]],
    other_than: tuple[Keep, Bridges],
    turned: float = 0.0,
) -> None:
    """Compares what `drafts_of` saw with drafts computed offline, one token at a time and as `sdfp plan` does.

    Args:
        other_than: A draft that would be noticed: it must differ in more than five rounds.
        turned: Share of rounds that may differ: where activations are rounded, a sum's last bit can turn a whole step
            of a code, and with it a near-tie.
    """
    different = one_by_one = compared = wrong = batched = 0
    for prompt, answer, seen in zip(prompts, answers, rounds, strict=True):
        text = prompt + answer[0]
        for start, drafted in list(seen.items())[:6]:
            if start < len(text):
                compared += 1
                one_by_one += drafted != draft_offline(stack, keep, bridges, text[: start + 1])
                different += drafted != draft_offline(stack, *other_than, text[: start + 1])
        bad, of = check_rollout(stack, keep, bridges, prompt, text, seen)
        wrong, batched = wrong + bad, batched + of
    assert one_by_one <= turned * compared and wrong <= turned * batched, (
        one_by_one,
        compared,
        wrong,
        batched,
    )
    assert different > max(5, 2 * one_by_one)


def check_rollout(
    stack: DecoderStack, keep: Keep, bridges: Bridges, prompt: list[int], text: list[int], seen
) -> tuple[int, int]:
    """The estimate that `sdfp plan` makes: in how many rounds it is not what the engine's drafts came to, and of how many."""
    ids = torch.tensor([text])
    runs = DraftRollout(stack, Continuations(ids, len(prompt), torch.tensor([len(text)]))).run(
        keep, K, bridges=bridges
    )
    wrong = of = 0
    for start, drafted in seen.items():
        after = text[start + 1 :]
        if len(after) >= K:
            agree = next((j for j in range(K) if drafted[j] != after[j]), K)
            wrong, of = wrong + (int(runs.lengths[0, start - len(prompt)]) != agree), of + 1
    return wrong, of

"""Which window of a long context makes drafts fastest, and from which length on: tried on the check's engine.

It drafts with the plan's view, as many tokens a round as the plan says, after texts of each of CONTEXTS; windows
take turns. It holds each text in its prefix cache, so that no window's time has a prefill in it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from sdfp_vllm.common.checkpoint import decoder_config
from sdfp_vllm.measure.spec import Turn, TurnMeasurement
from sdfp_vllm.plan.schema import WindowTried
from sdfp_vllm.plan.window import DraftWindow
from sdfp_vllm.planner.long_texts import SPARE, LongText

CONTEXTS = (2048, 4096, 8192)  # where the text written after them ends
LASTS = (512, 2048)
TEXTS = 2
PAYS = 1.03  # over drafts that see all of the context; less may be noise
_NEW_TOKENS = 48
_NONE: Literal["none"] = "none"


def turns_of(texts: Sequence[LongText], contexts: Sequence[int], drafts: int) -> list[Turn]:
    """For each text and context a turn that fills the prefix cache, then one for each window shorter than it.

    Args:
        drafts: So many a round, whatever pacing says: it would learn in one turn what the next is judged by.
    """
    turns = []
    for text in texts:
        for context in contexts:
            prompt = text.prompt(context, _NEW_TOKENS)
            turns.append(Turn(prompts=[prompt], max_tokens=1))
            windows: list[int | Literal["none"]] = [_NONE, *(w for w in LASTS if w < context)]
            turns += [
                Turn(prompts=[prompt], max_tokens=_NEW_TOKENS, window=last, drafts=drafts, copies=False)
                for last in windows
            ]
    return turns


def tried_of(turns: Sequence[Turn], measured: Sequence[TurnMeasurement]) -> list[WindowTried]:
    """What each window gave after each context, all texts together."""
    runs: dict[tuple[int, int | Literal["none"]], list[TurnMeasurement]] = {}
    for turn, got in zip(turns, measured, strict=True):
        if turn.window is not None:
            context = len(turn.prompts[0]) + _NEW_TOKENS + SPARE
            runs.setdefault((context, turn.window), []).append(got)
    tried = []
    for (context, last), of in runs.items():
        drafted = sum(t.draft_tokens for t in of)
        tried.append(
            WindowTried(
                context=context,
                last=None if last == _NONE else last,
                tokens_per_second=sum(len(ids) - 1 for t in of for ids in t.token_ids)
                / sum(t.decode_seconds for t in of),
                acceptance_rate=sum(t.accepted_tokens for t in of) / drafted if drafted else 0.0,
            )
        )
    return tried


def best_window(tried: Sequence[WindowTried]) -> DraftWindow | None:
    """The window that is fastest after the longest context, for contexts from the shortest on from which it pays.

    None where none pays after the longest.
    """
    speeds: dict[int, Mapping[int | None, float]] = {}
    for t in tried:
        speeds[t.context] = {**speeds.get(t.context, {}), t.last: t.tokens_per_second}
    longest = max(speeds)
    last = max((w for w in speeds[longest] if w is not None), key=lambda w: speeds[longest][w])

    def pays(context: int) -> bool:
        return speeds[context].get(last, 0.0) > PAYS * speeds[context][None]

    paying = list(itertools.takewhile(pays, sorted(speeds, reverse=True)))
    return DraftWindow(last=last, beyond=paying[-1] - _NEW_TOKENS - SPARE) if paying else None


def kv_gigabytes(model_dir: Path, dtype: str, tokens: int) -> int:
    """Room for K/V of `tokens` tokens and for blocks to begin the next with."""
    config = decoder_config(model_dir)
    heads = config["num_attention_heads"]
    width = (config.get("num_key_value_heads") or heads) * (
        config.get("head_dim") or config["hidden_size"] // heads
    )
    values = 2 * config["num_hidden_layers"] * width  # of a token
    return math.ceil(1.2 * values * getattr(torch, dtype).itemsize * tokens / (1 << 30))

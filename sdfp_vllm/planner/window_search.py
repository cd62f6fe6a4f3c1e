"""Whether drafts that see a window of a long context are faster, and from which length on: tried on an engine.

One engine drafts with the plan's view, as many tokens a round as the plan says, after texts of each of CONTEXTS; windows
take turns. It holds each text in its prefix cache, so that no window's time has a prefill in it.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sdfp_vllm.measure.engines import run_engine
from sdfp_vllm.measure.spec import EngineSpec, Measurement, Turn
from sdfp_vllm.plan.schema import SkipPlan, WindowTried
from sdfp_vllm.plan.window import DraftWindow
from sdfp_vllm.planner.calibration import is_chat_source, load_calibration
from sdfp_vllm.planner.engine_check import engine_is_here, engine_settings
from sdfp_vllm.planner.options import PlanOptions
from sdfp_vllm.planner.work import Work

CONTEXTS = (1024, 2048, 4096, 8192)  # where the text written after them ends
LASTS = (256, 512, 1024, 2048)
PAYS = 1.03  # over drafts that see all of the context; less may be noise
_TEXTS, _NEW_TOKENS = 2, 48
_SPARE = 40  # positions for drafts behind the text
_NONE: Literal["none"] = "none"


def with_window(work: Work, plan: SkipPlan, texts: list[list[int]]) -> SkipPlan:
    """`plan`, saved in the job's folder, with the window that is fastest after all of `texts`, and what was tried.

    Without one where none is faster, or there is no engine.

    Raises:
        SdfpError: If the engine fails.
    """
    if plan.costs is None or not engine_is_here():
        return plan
    contexts = [c for c in CONTEXTS if c <= len(texts[0])]
    turns = turns_of(texts, contexts)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model_dir, options = work.model_dir, work.options
    with work.bar.step(f"Drafts after up to {contexts[-1]:,} tokens", 1):
        measured = run_engine(
            EngineSpec(
                model=str(model_dir),
                turns=turns,
                warm_up=texts[0][:64],
                speculative={
                    "method": "sdfp",
                    "model": str(work.folder),
                    "num_speculative_tokens": plan.num_speculative_tokens,
                    "window": LASTS[0],
                },
                dtype=plan.costs.dtype,
                ignore_eos=True,
                engine=engine_settings(work.identity, contexts[-1], options)
                | {"max_model_len": contexts[-1], "enable_prefix_caching": True},
                environment={
                    "VLLM_CPU_KVCACHE_SPACE": str(kv_gigabytes(model_dir, plan.costs.dtype, contexts[-1]))
                },
            )
        )
    tried = tried_of(turns, measured, contexts)
    return plan.with_window(best_window(tried)).model_copy(update={"windows": tried})


def long_texts(model_dir: Path, tokenizer: Any, options: PlanOptions) -> list[list[int]]:
    """Token ids to draft after, as long as the model and CONTEXTS go; none for a model of short contexts only.

    Raises:
        SdfpError: If there is not enough text.
    """
    lengths = [c for c in CONTEXTS if c <= positions(model_dir)]
    if not lengths:
        return []
    chats = options.calibration is not None and is_chat_source(options.calibration)
    source = None if chats else options.calibration
    return load_calibration(
        source, tokenizer, sequences=_TEXTS, length=lengths[-1], seed=options.seed + 2, field=options.field
    ).ids.tolist()


def turns_of(texts: Sequence[list[int]], contexts: Sequence[int]) -> list[Turn]:
    """For each text and context a turn that fills the prefix cache, then one for each window shorter than it."""
    turns = []
    for text in texts:
        for context in contexts:
            prompt = text[: context - _NEW_TOKENS - _SPARE]
            turns.append(Turn(prompts=[prompt], max_tokens=1))
            windows: list[int | Literal["none"]] = [_NONE, *(w for w in LASTS if w < context)]
            turns += [Turn(prompts=[prompt], max_tokens=_NEW_TOKENS, window=last) for last in windows]
    return turns


def tried_of(turns: Sequence[Turn], measured: Measurement, contexts: Sequence[int]) -> list[WindowTried]:
    """What each window gave after each context, all texts together."""
    runs: dict[tuple[int, Any], list[Any]] = {}
    for turn, got in zip(turns, measured.turns, strict=True):
        if turn.window is not None:
            context = len(turn.prompts[0]) + _NEW_TOKENS + _SPARE
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
    return DraftWindow(last=last, beyond=paying[-1] - _NEW_TOKENS - _SPARE) if paying else None


def positions(model_dir: Path) -> int:
    """The longest context that the model is made for."""
    return int(_config(model_dir).get("max_position_embeddings") or 0)


def kv_gigabytes(model_dir: Path, dtype: str, tokens: int) -> int:
    """Room for K/V of `tokens` tokens and for blocks to begin the next with."""
    config = _config(model_dir)
    heads = config["num_attention_heads"]
    width = (config.get("num_key_value_heads") or heads) * (
        config.get("head_dim") or config["hidden_size"] // heads
    )
    values = 2 * config["num_hidden_layers"] * width  # of a token
    return math.ceil(1.2 * values * getattr(torch, dtype).itemsize * tokens / (1 << 30))


def _config(model_dir: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    return config.get("text_config") or config

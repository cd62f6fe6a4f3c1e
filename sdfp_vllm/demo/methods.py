"""The ways of decoding that are compared, each as vLLM takes it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PLAIN, OWN_DTYPE, SDFP, PAPER = "plain", "plain, own dtype", "sdfp", "paper"
NGRAM, SUFFIX, DRAFT_MODEL = "ngram", "suffix", "draft_model"
METHODS = (PLAIN, OWN_DTYPE, SDFP, NGRAM, SUFFIX, DRAFT_MODEL, PAPER)
# SDFP answers each prompt twice: its paced engine is told whether it may copy from the context.
ALONE = "sdfp, no copies"
_DRAFT_MODEL_TOKENS = 3


def can_run(method: str, draft: str | None = None) -> bool:
    """Whether a method can run here: suffix decoding wants a package, `draft_model` a smaller model."""
    if method == SUFFIX:
        return find_spec("arctic_inference") is not None
    return method != DRAFT_MODEL or draft is not None


def speculative(method: str, plans: Mapping[str, Path], draft: str | None = None) -> dict[str, Any] | None:
    """vLLM's `speculative_config` for a method; None for plain decoding.

    Args:
        plans: Plan folders of SDFP and of PAPER (whole layers by FIT, at full precision, no copies).
        draft: The smaller model of `draft_model`.
    """
    if method in (SDFP, PAPER):
        own: dict[str, Any] = {"ngram": False} if method == PAPER else {}
        return {"method": "sdfp", "model": str(plans[method])} | own
    if method == NGRAM:
        return {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    if method == SUFFIX:
        return {"method": "suffix", "num_speculative_tokens": 16}
    if method == DRAFT_MODEL:
        return {"method": "draft_model", "model": draft, "num_speculative_tokens": _DRAFT_MODEL_TOKENS}
    return None

"""Whether this machine's memory holds several engines at once, and running them accordingly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from sdfp_vllm.measure.engines import run_engines
from sdfp_vllm.measure.spec import EngineSpec, Measurement
from sdfp_vllm.plan.model_files import weight_files

_OWN_BYTES = 2 << 30  # of an engine beside its weights
_PACKED = 1.7  # weights and what loading and packing take beside them
_SPARE = 0.9  # of the memory that is free


def loading_bytes(spec: EngineSpec, copies: int = 0) -> int:
    """Bytes of an engine while it loads. A float32 engine counts twice its checkpoint, as of 16-bit weights.

    Args:
        copies: Bytes of the rounded copies that an SDFP engine takes.
    """
    stored = sum(f.stat().st_size for f in weight_files(Path(spec.model)))
    own = copies if (spec.speculative or {}).get("method") == "sdfp" else 0
    return int(_PACKED * stored * (2 if spec.dtype == "float32" else 1)) + _OWN_BYTES + own


def fit_together(specs: Sequence[EngineSpec], copies: int = 0) -> bool:
    """Whether these engines may be held at once and take turns. On a GPU, which an engine takes whole, one alone."""
    if len(specs) < 2:
        return True
    needed = sum(loading_bytes(s, copies) for s in specs)
    return not torch.cuda.is_available() and needed <= _SPARE * psutil.virtual_memory().available


def run_as_memory_allows(
    specs: Sequence[EngineSpec],
    copies: int = 0,
    on_step: Callable[[int, int], None] = lambda engine, done: None,
) -> tuple[list[Measurement], bool]:
    """Runs engines in turns where memory holds all of them, else one after the other; True if in turns.

    Args:
        on_step: As `run_engines` has it, over all engines.
    """
    if fit_together(specs, copies):
        return run_engines(specs, on_step), True
    measured: list[Measurement] = []
    before = 0
    for i, spec in enumerate(specs):
        measured += run_engines([spec], lambda _, done, i=i, before=before: on_step(i, before + done))  # type: ignore[misc]
        before += 1 + len(spec.own_turns)
    return measured, False

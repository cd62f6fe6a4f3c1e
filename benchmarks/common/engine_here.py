"""An engine in the benchmark's own process: its environment, its counters, and a stopwatch for its drafting."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any


def engines_here(threads: int = 1) -> None:
    """Sets what vLLM and torch read from the environment; to be called before either is imported."""
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def draft_counts(llm: Any) -> tuple[float, float, float]:
    """Rounds, drafts and accepted drafts of an engine so far, by vLLM's own counters."""
    values = {m.name: getattr(m, "value", 0.0) for m in llm.get_metrics()}
    prefix = "vllm:spec_decode_num_"
    return values[f"{prefix}drafts"], values[f"{prefix}draft_tokens"], values[f"{prefix}accepted_tokens"]


def acceptance(llm: Any, before: Sequence[float]) -> tuple[float, float]:
    """The accepted share of all drafts since `before` (`draft_counts` of then), and tokens a round."""
    rounds, drafts, accepted = (now - then for now, then in zip(draft_counts(llm), before, strict=True))
    return accepted / drafts, 1 + accepted / rounds


class Stopwatch:
    """Milliseconds per draft step of a V1 proposer's methods `parts`, and of the whole round, by round."""

    def __init__(self, proposer: Any, parts: Sequence[str]):
        self.rounds: list[dict[str, float]] = []
        self._spent: dict[str, float] = defaultdict(float)
        for name in parts:
            setattr(proposer, name, self._timed(name, getattr(proposer, name)))
        propose = self._timed("round", proposer.propose)

        def a_round(num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
            self._spent.clear()
            out = propose(num_speculative_tokens, *args, **kwargs)
            if num_speculative_tokens:
                self.rounds.append({name: ms / num_speculative_tokens for name, ms in self._spent.items()})
            return out

        proposer.propose = a_round

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = call(*args, **kwargs)
            self._spent[name] += (time.perf_counter() - start) * 1e3
            return out

        return run

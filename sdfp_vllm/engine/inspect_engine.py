"""What benchmarks read off a running engine that vLLM's own metrics do not tell."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from sdfp_vllm.pacing.fixed import FixedPolicy
from sdfp_vllm.plan.window import parse_window


def kv_bytes_per_token(llm: Any) -> float | None:
    """KV cache the engine spends per token, drafts included: the space it was given over the tokens that fit.

    Known on the CPU only, where the space is a setting.
    """
    import vllm.envs as envs
    from vllm.platforms import current_platform

    cache = llm.llm_engine.vllm_config.cache_config
    if not current_platform.is_cpu() or not envs.VLLM_CPU_KVCACHE_SPACE or not cache.num_gpu_blocks:
        return None
    return envs.VLLM_CPU_KVCACHE_SPACE * 2**30 / (cache.num_gpu_blocks * cache.block_size)


class DraftingTime:
    """Seconds that an in-process engine of the V1 runner has spent in its drafter, whichever it is; else 0."""

    def __init__(self, llm: Any):
        self.seconds = 0.0
        drafter = _drafter(llm)
        if drafter is not None:
            propose = drafter.propose

            def timed(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                try:
                    return propose(*args, **kwargs)
                finally:
                    self.seconds += time.perf_counter() - began

            drafter.propose = timed


def rounds_paced(llm: Any) -> Counter[tuple[int, int, int]]:
    """`Tally.rounds` of an in-process engine so far; empty where it is not paced."""
    pacer = getattr(_drafter(llm), "pacer", None)
    return Counter(pacer.tally.rounds) if pacer else Counter()


def allow_copies(llm: Any, allowed: bool) -> None:
    """Lets an in-process paced engine copy drafts from the context, or not."""
    pacer = getattr(_drafter(llm), "pacer", None)
    if pacer is not None:
        pacer.copies = allowed


def fix_drafts(llm: Any, count: int | None) -> None:
    """Lets an in-process paced engine draft `count` tokens a request and round with its model, or pace them (None) again.

    Meanwhile a policy of its own learns what happens: the one that paces stays as it was.
    """
    pacer = getattr(_drafter(llm), "pacer", None)
    if pacer is None:
        return
    paced = pacer.policy.paced if isinstance(pacer.policy, FixedPolicy) else pacer.policy
    pacer.policy = paced if count is None else FixedPolicy(paced, count)


def narrow_drafts(llm: Any, window: int | str) -> None:
    """Lets the drafts of an in-process engine, which was set up with a window, see another, or "none" for all.

    Raises:
        SdfpError: If `window` is neither.
    """
    drafter = _drafter(llm) or _runner(llm).speculator
    drafter.window = parse_window("window", window)


def _drafter(llm: Any) -> Any:
    return getattr(_runner(llm), "drafter", None)


def _runner(llm: Any) -> Any:
    worker = getattr(getattr(llm.llm_engine, "model_executor", None), "driver_worker", None)
    return getattr(getattr(worker, "worker", None), "model_runner", None)

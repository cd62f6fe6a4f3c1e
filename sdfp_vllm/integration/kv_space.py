"""How much of the KV cache's space a token takes, read off a running engine."""

from __future__ import annotations

from typing import Any


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

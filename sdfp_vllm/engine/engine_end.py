"""Taking an engine down, so that another can be started in the same process."""

from __future__ import annotations

from typing import Any


def has_unfinished(llm: Any) -> bool:
    """Whether requests are left in the engine: after an exception, that it was at work on them."""
    return bool(llm.llm_engine.has_unfinished_requests())


def end_engine(llm: Any) -> None:
    """Ends the engine of an `LLM` and its processes; `free_engine` once nobody refers to it."""
    llm.llm_engine.engine_core.shutdown()


def free_engine() -> None:
    """Frees the process groups and the memory of the engine that ended."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()

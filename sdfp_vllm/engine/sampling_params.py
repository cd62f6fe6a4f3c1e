"""Sampling settings that vLLM would refuse once its engine runs, refused before it starts."""

from __future__ import annotations

from typing import Any

from sdfp_vllm.errors import SdfpError

_SEEDS = range(-(2**63), 2**63)  # what vLLM's server takes; a seed beyond ends the engine that draws with it


def check_sampling(where: str, settings: dict[str, Any]) -> None:
    """Refuses what vLLM's own SamplingParams refuse, and a seed of more than 64 bits.

    Args:
        where: The row or flag that asks for it, for the error.
        settings: Arguments of SamplingParams.

    Raises:
        SdfpError: With vLLM's words.
    """
    from vllm import SamplingParams

    try:
        SamplingParams(**settings)
    except Exception as e:  # vLLM's own class of them, which is no ValueError
        raise SdfpError(where, str(e.args[0]).rstrip("."), "Correct it.") from e
    seed = settings.get("seed")
    if seed is not None and seed not in _SEEDS:
        raise SdfpError(where, f"seed must be a whole number of 64 bits, got {seed}", "Correct it.")

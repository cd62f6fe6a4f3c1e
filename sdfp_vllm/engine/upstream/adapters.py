# ruff: noqa: E402
"""Every vLLM symbol that drafting with LoRA adapters builds on; imported only where an engine has adapters."""

from __future__ import annotations

from sdfp_vllm.engine.upstream.releases import refuse_missing

refuse_missing("adapters")

from vllm.lora.layers import LoRAMapping

__all__ = ["LoRAMapping"]

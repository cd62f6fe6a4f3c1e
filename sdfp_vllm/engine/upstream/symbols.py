# ruff: noqa: E402
"""Every vLLM symbol the runtime builds on, in one place; `docs/reference/upstream.md` says what for.

One that is missing is refused here by name, in whichever process comes first.
"""

from __future__ import annotations

from sdfp_vllm.engine.upstream.releases import refuse_missing

refuse_missing("engine")

from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import (
    CUDAGraphMode,
    VllmConfig,
    get_current_vllm_config_or_none,
    get_layers_from_vllm_config,
)
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, UniformTypeKVCacheSpecs
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.draft_model import DraftModelProposer
from vllm.v1.spec_decode.utils import eagle_step_update_slot_mapping_and_metadata
from vllm.v1.worker.utils import AttentionGroup

__all__ = [
    "AttentionGroup",
    "AttentionLayerBase",
    "CUDAGraphMode",
    "CommonAttentionMetadata",
    "DraftModelProposer",
    "EngineArgs",
    "FullAttentionSpec",
    "GemmaRMSNorm",
    "KVCacheConfig",
    "RMSNorm",
    "SamplingMetadata",
    "SpeculativeConfig",
    "UniformTypeKVCacheSpecs",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "config",
    "current_platform",
    "eagle_step_update_slot_mapping_and_metadata",
    "get_current_vllm_config_or_none",
    "get_layers_from_vllm_config",
    "init_logger",
    "set_forward_context",
    "set_model_tag",
    "support_torch_compile",
]

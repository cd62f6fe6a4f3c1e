# ruff: noqa: E402
"""Every vLLM symbol that linears in lower precision build on; imported only where there are some."""

from __future__ import annotations

from sdfp_vllm.engine.upstream.releases import refuse_missing

refuse_missing("rounded")

from vllm.config import (
    CompilationConfig,
    CompilationMode,
    VllmConfig,
    get_current_vllm_config_or_none,
    set_current_vllm_config,
)
from vllm.model_executor.kernels.linear import (
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
    init_fp8_linear_kernel,
    init_int8_linear_kernel,
    init_mxfp4_linear_kernel,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kMxfp4Dynamic,
)
from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

__all__ = [
    "CompilationConfig",
    "CompilationMode",
    "GroupQuantScaleParameter",
    "MPLinearLayerConfig",
    "PackedvLLMParameter",
    "VllmConfig",
    "choose_mp_linear_kernel",
    "current_platform",
    "get_current_vllm_config_or_none",
    "init_fp8_linear_kernel",
    "init_int8_linear_kernel",
    "init_mxfp4_linear_kernel",
    "kFp8DynamicTokenSym",
    "kFp8StaticChannelSym",
    "kMxfp4Dynamic",
    "scalar_types",
    "set_current_vllm_config",
]

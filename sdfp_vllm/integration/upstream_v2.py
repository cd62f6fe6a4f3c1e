"""Every symbol of vLLM's V2 model runner the speculator builds on; imported only where that runner runs."""

from __future__ import annotations

from sdfp_vllm.errors import SdfpError
from sdfp_vllm.integration.upstream import TRIED_VERSIONS, CUDAGraphMode, VllmConfig, set_forward_context

try:
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
    from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
    from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
        SpeculatorBatchDescriptor,
        SpeculatorCudaGraphManager,
    )
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import TargetDependentARSpeculator
except ImportError as e:
    raise SdfpError(
        f"vLLM symbol {e.name}",
        f"is not where this release of sdfp-vllm expects it in the V2 model runner ({e})",
        f"Install a vLLM release it was tried on ({TRIED_VERSIONS}), or set VLLM_USE_V2_MODEL_RUNNER=0.",
    ) from e

__all__ = [
    "BatchDescriptor",
    "CUDAGraphMode",
    "DPSyncState",
    "DraftModelSpeculator",
    "InputBatch",
    "SpeculatorBatchDescriptor",
    "SpeculatorCudaGraphManager",
    "TargetDependentARSpeculator",
    "VllmConfig",
    "build_dynamic_sd_schedule_lookup",
    "build_slot_mappings_by_layer",
    "dispatch_cg_and_sync_dp",
    "set_forward_context",
]

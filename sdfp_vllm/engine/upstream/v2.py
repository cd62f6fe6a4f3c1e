# ruff: noqa: E402
"""Every symbol of vLLM's V2 model runner the speculator builds on; imported only where that runner runs."""

from __future__ import annotations

from sdfp_vllm.engine.upstream.releases import refuse_missing
from sdfp_vllm.engine.upstream.symbols import CUDAGraphMode, VllmConfig, set_forward_context

refuse_missing("v2")

from vllm.forward_context import BatchDescriptor
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.dp_utils import DPSyncState, dispatch_cg_and_sync_dp
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import (
    SpeculatorBatchDescriptor,
    SpeculatorCudaGraphManager,
)
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import TargetDependentARSpeculator

__all__ = [
    "BatchDescriptor",
    "CUDAGraphMode",
    "CudaGraphManager",
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

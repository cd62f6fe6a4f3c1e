"""What vLLM's V2 runner knows of a batch's LoRA adapters, handed to the speculator; and a mend of upstream's mapping."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from sdfp_vllm.engine.upstream.releases import refuse_missing

_MARK = "_sdfp_patched"


def follow_adapters() -> None:
    """Wraps `GPUModelRunner.prepare_inputs` and `LoraState.make_lora_inputs`, once; called where an engine has adapters.

    The speculator is not told which adapter a request has: it finds the ids as `adapter_ids`, int32 [requests], in the
    order of the batch. And upstream (0.32.0) maps one row of logits per request, as if nothing were ever drafted: with
    any speculative method, an adapter of the head is applied to the wrong rows, on a CPU with an error. Mapped here are
    as many rows as the step has logits.
    """
    refuse_missing("adapters_v2")
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    runner_class: Any = GPUModelRunner
    if _MARK in vars(LoraState):
        return
    prepare, make = runner_class.prepare_inputs, LoraState.make_lora_inputs

    @functools.wraps(prepare)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = prepare(self, *args, **kwargs)
        self.lora_state.logits_per_request = np.diff(batch.cu_num_logits_np[: batch.num_reqs + 1])
        if hasattr(self.speculator, "adapter_ids"):
            self.speculator.adapter_ids = self.lora_state.lora_ids[batch.idx_mapping_np].tolist()
        return batch

    @functools.wraps(make)
    def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
        _, tokens, requests = make(self, req_ids, idx_mapping, num_scheduled_tokens)
        return tuple(self.lora_ids[idx_mapping].repeat(self.logits_per_request)), tokens, requests

    runner_class.prepare_inputs = prepare_inputs
    LoraState.make_lora_inputs = make_lora_inputs  # type: ignore[method-assign]
    setattr(LoraState, _MARK, True)

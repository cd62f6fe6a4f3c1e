"""The k draft steps of a round in vLLM's V2 runner, once the buffers of the first are filled.

Where every attention group can refresh its metadata in place, all k run without the host and are
captured as one CUDA graph for each (batch size, k); else metadata is built anew for each step, and
a step is what a graph holds.
"""

from __future__ import annotations

from typing import Any

import torch

from sdfp_vllm.engine.upstream.v2 import (
    BatchDescriptor,
    CUDAGraphMode,
    TargetDependentARSpeculator,
    VllmConfig,
    build_slot_mappings_by_layer,
    set_forward_context,
)
from sdfp_vllm.engine.v2.positions import RotaryPositions
from sdfp_vllm.kernels.draft_step import DraftWorkspace, KvSlots, draft_step


class DraftSteps(TargetDependentARSpeculator):
    """The half of a speculator that runs draft steps; the other fills the buffers they begin with."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        # Drafts are fed by tokens alone: of upstream's hidden-state buffer only a width of 0 is left.
        self.hidden_states = self.hidden_states[: self.max_num_reqs, :0].clone()
        self._slots = _no_slots(self.max_num_reqs, device)
        self._workspace = DraftWorkspace(self.max_num_reqs, self.vocab_size, device)
        model = vllm_config.model_config
        self.rotary: RotaryPositions | None = None
        if model.uses_mrope:
            self.rotary = RotaryPositions(model.mrope_num_dims, self.max_num_tokens, device)

    @property
    def _samples_upstream(self) -> bool:
        """Whether a feature is on whose sampling vLLM's own kernels do: watermarks, acceptance estimates, ..."""
        return bool(
            self.draft_watermarker
            or self.acceptance_estimator
            or self.use_local_argmax_reduction
            or (self.use_fp64_gumbel and self.draft_logits is not None)
        )

    def _generate_draft(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        """One draft step: forward, sample, and move every request and its slots one position on."""
        buffers = self.input_buffers
        if self._samples_upstream:
            super()._generate_draft(
                num_reqs,
                num_tokens_padded,
                attn_metadata,
                slot_mappings,
                num_tokens_across_dp,
                cudagraph_runtime_mode,
                num_speculative_steps,
            )
            if attn_metadata is not None:
                self.block_tables.compute_slot_mappings(
                    self.idx_mapping[:num_reqs],
                    buffers.query_start_loc[: num_reqs + 1],
                    buffers.positions[:num_reqs],
                    num_tokens_padded,
                )
            return
        hidden, _ = self._run_model(
            num_tokens_padded, attn_metadata, slot_mappings, num_tokens_across_dp, cudagraph_runtime_mode
        )
        sampling = self.draft_logits is not None
        draft_step(
            self.compute_draft_logits(hidden[:num_reqs], 0),
            self.idx_mapping[:num_reqs],
            self.temperature if sampling else None,
            self.seeds if sampling else None,
            self.current_draft_step,
            buffers.positions,
            buffers.seq_lens,
            buffers.input_ids,
            self.draft_tokens,
            self._slots,
            self.max_model_len,
            self._workspace,
            self.draft_logits,
        )

    def _multi_step_decode(
        self,
        num_reqs: int,
        skip_attn: bool,
        batch_desc: Any,
        num_tokens_across_dp: torch.Tensor | None,
        seq_lens_cpu_upper_bound: torch.Tensor,
        num_speculative_steps: int,
    ) -> None:
        """All k steps with attention metadata built anew for each."""
        metadata = slots = None
        if not skip_attn:
            slots = self._slots_by_layer(batch_desc.num_tokens)
        for step in range(num_speculative_steps):
            if not skip_attn:
                metadata = self._build_uniform_attn_metadata(
                    num_reqs=num_reqs,
                    batch_desc=batch_desc,
                    num_query_per_req=1,
                    seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
                    step=step + 1,
                )
            self.current_draft_step.fill_(step)
            if batch_desc.cg_mode == CUDAGraphMode.FULL:
                assert self.decode_cudagraph_manager is not None
                self.decode_cudagraph_manager.run_fullgraph(batch_desc)
                continue
            self._generate_draft(
                num_reqs,
                batch_desc.num_tokens,
                metadata,
                slots,
                num_tokens_across_dp,
                batch_desc.cg_mode,
                num_speculative_steps,
            )

    def _fused_multi_step_decode(
        self,
        num_reqs: int,
        skip_attn: bool,
        batch_desc: Any,
        num_tokens_across_dp: torch.Tensor | None,
        seq_lens_cpu_upper_bound: torch.Tensor,
        num_speculative_steps: int,
    ) -> None:
        """All k steps on attention metadata built once and refreshed on the device."""
        if batch_desc.cg_mode == CUDAGraphMode.FULL:
            for groups in self.attn_groups:
                for group in groups:
                    group.map_to_kernel_block_table(
                        self.block_tables.input_block_tables[group.kv_cache_group_id]
                    )
            assert self.decode_cudagraph_manager is not None
            self.decode_cudagraph_manager.run_fullgraph(batch_desc)
            return
        metadata = slots = None
        if not skip_attn:
            slots = self._slots_by_layer(batch_desc.num_tokens)
            metadata = self._build_uniform_attn_metadata(
                num_reqs=num_reqs,
                batch_desc=batch_desc,
                num_query_per_req=1,
                seq_lens_cpu_upper_bound=seq_lens_cpu_upper_bound,
                step=1,
            )
        self._generate_fused_drafts(
            num_reqs,
            batch_desc.num_tokens,
            metadata,
            slots,
            num_tokens_across_dp,
            batch_desc.cg_mode,
            num_speculative_steps,
        )

    def _slots_by_layer(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """Views of the slot buffers, int64 [num_tokens], which every draft step fills for the next."""
        return build_slot_mappings_by_layer(
            self.block_tables.slot_mappings[:, :num_tokens], self.kv_cache_config
        )

    def _generate_fused_drafts(
        self,
        num_reqs: int,
        num_tokens_padded: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode,
        num_speculative_steps: int,
    ) -> None:
        """All k steps without the host: positions, slots and attention metadata advance on the device."""
        for step in range(num_speculative_steps):
            if attn_metadata is not None:
                self._update_draft_decode_metadata(attn_metadata, num_reqs)
            self.current_draft_step.fill_(step)
            self._generate_draft(
                num_reqs,
                num_tokens_padded,
                attn_metadata,
                slot_mappings,
                num_tokens_across_dp,
                cudagraph_runtime_mode,
                num_speculative_steps,
            )

    @torch.inference_mode()
    def _run_model(
        self,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        num_tokens_across_dp: torch.Tensor | None,
        cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE,
        mm_inputs: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft forward: final hidden states [num_tokens, hidden], and none to feed back."""
        places = self.input_buffers.positions[:num_tokens]
        positions = self.rotary.at(places) if self.rotary else places
        with set_forward_context(
            attn_metadata,
            self.vllm_config,
            num_tokens=num_tokens,
            cudagraph_runtime_mode=cudagraph_runtime_mode,
            num_tokens_across_dp=num_tokens_across_dp,
            slot_mapping=slot_mappings,
            batch_descriptor=BatchDescriptor(num_tokens=num_tokens),
        ):
            hidden = self.model(
                input_ids=self.input_buffers.input_ids[:num_tokens],
                positions=positions,
            )
        return hidden, hidden[:, :0]


def _no_slots(rows: int, device: torch.device) -> KvSlots:
    """What stands in for the KV cache while memory is profiled, before there is one."""
    return KvSlots(
        (torch.zeros(1, 1, dtype=torch.int32, device=device),),
        (1,),
        torch.zeros(1, rows, dtype=torch.int64, device=device),
    )

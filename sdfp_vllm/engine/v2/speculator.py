"""SdfpSpeculator: drafts in vLLM's V2 runner with the target's kept layers over the target's KV cache.

Positions are those of `proposer.py`: the target has computed 0..P of a request and sampled the
token of P + 1; draft step j feeds one token per request at P + 1 + j, into the slots that the
scheduler's lookahead reserved. Upstream's autoregressive speculators spend their first step on a
pass over all tokens of the target's batch (the draft's prefill); the KV cache here is the
target's, so all k steps are decode steps of one token per request. Here is what the runner calls;
the steps themselves are in `draft_steps.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdfp_vllm.engine.draft.adapters import BASE, DraftAdapters
from sdfp_vllm.engine.draft.load import load_draft
from sdfp_vllm.engine.draft.window import gaps, longest_seen, narrowed_layers, reaches, without_gaps
from sdfp_vllm.engine.upstream.symbols import init_logger
from sdfp_vllm.engine.upstream.v2 import (
    CUDAGraphMode,
    DPSyncState,
    DraftModelSpeculator,
    InputBatch,
    VllmConfig,
    dispatch_cg_and_sync_dp,
)
from sdfp_vllm.engine.v2.adapters import follow_adapters
from sdfp_vllm.engine.v2.graphs import DraftGraphManager
from sdfp_vllm.engine.v2.steps import DraftSteps
from sdfp_vllm.kernels.draft_begin import draft_begin
from sdfp_vllm.kernels.draft_step import KvSlots
from sdfp_vllm.plan.window import DraftWindow

logger = init_logger(f"vllm.{__name__}")


class SdfpSpeculator(DraftSteps):
    """An autoregressive speculator without a second model, a second KV cache or a first pass."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        self._drafting: set[str] = set()
        self.adapter_ids: list[int] = []  # of the requests of the step that is being verified
        if vllm_config.lora_config is not None:
            follow_adapters()
        self.window: DraftWindow | None = vllm_config.speculative_config.plan.view.window  # type: ignore[union-attr]

    # ------------------------------------------------------------ set-up
    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """Builds the draft over `target_model`'s modules (see `load_draft`)."""
        draft, self._drafting = load_draft(self.vllm_config, target_model)
        config: Any = self.vllm_config.speculative_config
        self.adapters = DraftAdapters(target_model, config.drafting.padding, config.own_adapters)
        return draft

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """Makes attention metadata builders for the kept layers.

        The runner takes `draft_attn_layer_names` for layers that are not the target's; the kept
        ones are, so the set is filled only while the draft's own groups are made.
        """
        if "max_model_len" in vars(self):  # 0.32 reads it before it is fitted to memory
            self.max_model_len = self.vllm_config.model_config.max_model_len
        self.draft_attn_layer_names = self._drafting
        try:
            super().set_attn(*args, **kwargs)
        finally:
            self.draft_attn_layer_names = set()
        self._slots = KvSlots(
            tuple(table.gpu for table in self.block_tables.block_tables),
            tuple(self.block_tables.block_sizes),
            self.block_tables.slot_mappings,
        )
        self._check_window()

    def _check_window(self) -> None:
        """Drops the window where not all attention of the draft can be narrowed alike: this runner's draft steps have
        one sequence length per request, whatever the layer."""
        groups = [gid for gid, of_gid in enumerate(self.attn_groups) if of_gid]
        narrowed = narrowed_layers(self.window, self.vllm_config, self._drafting)
        if len(groups) == 1 and narrowed == self._drafting:
            return
        if narrowed:
            logger.warning(
                "Drafts attend to the whole context, not to %s: not all of their attention layers can be narrowed alike, "
                "and the V2 model runner cannot narrow some of them. VLLM_USE_V2_MODEL_RUNNER=0 can.",
                self.window,
            )
        self.window = None

    def _configure_decode_metadata_update(self) -> None:
        # Upstream has nothing to update at one draft token, its first being a prefill; here it is a decode.
        DraftModelSpeculator._configure_decode_metadata_update(self)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """One manager, for decode steps: FULL graphs where the target has them, else none."""
        full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        self.decode_cudagraph_manager = DraftGraphManager(
            self.vllm_config,
            self.device,
            CUDAGraphMode.FULL_DECODE_ONLY if full else CUDAGraphMode.NONE,
            decode_query_len=1,
        )
        self.decode_cudagraph_manager.before_each = self.adapters.begin_capture

    def capture(self) -> None:
        """Captures all k steps as one graph, or one step as a graph, for each batch size."""
        assert self.decode_cudagraph_manager is not None
        self.idx_mapping.fill_(-1)  # while warming up and recording, no row is anyone's
        fused = self.supports_decode_metadata_update
        self.decode_cudagraph_manager.capture(
            self._generate_fused_drafts if fused else self._generate_draft,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            progress_bar_desc="Capturing SDFP draft CUDA graphs",
            specialize_spec_tokens=fused and self.speculative_config.uses_dynamic_speculative_decoding(),
        )

    # ------------------------------------------------------------ drafting
    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: DPSyncState | None = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Drafts `num_speculative_tokens` (k >= 0; None: the configured number) tokens per request.

        Args:
            num_sampled: int32 [num_reqs]; 0 for a request in the middle of its prefill, which
                is not drafted for: its row writes no K/V.
            num_rejected: int32 [num_reqs], drafts rejected in this step, still counted in
                `input_batch.seq_lens`.
            last_sampled: int64 [max_num_reqs, 1], the token sampled last, by request state index.

        Returns:
            int64 [num_reqs, configured k]; columns from k on are not meant to be read.
        """
        num_reqs = input_batch.num_reqs
        if dummy_run and dp_sync_state is not None:
            num_reqs = min(num_reqs, dp_sync_state.num_reqs)  # what the ranks agreed on
        k = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        if k == 0:
            return self.draft_tokens[:num_reqs].fill_(-1)
        upper = input_batch.seq_lens_cpu_upper_bound[:num_reqs]
        longest = int(upper.max())
        self._begin(
            num_reqs,
            input_batch,
            num_sampled,
            num_rejected,
            last_sampled,
            temperature,
            seeds,
            dummy_run=dummy_run,
        )
        longest = self._narrow(num_reqs, longest)
        self.draft_max_seq_len = min(longest + k, self.max_model_len)

        sync, num_tokens = None, num_reqs
        if dp_sync_state is not None:
            sync, num_tokens = self._build_uniform_batch_dp_sync(dp_sync_state, num_reqs)
        batch, sync = dispatch_cg_and_sync_dp(
            self.decode_cudagraph_manager,
            num_reqs,
            num_tokens,
            uniform_token_count=1,
            dp_size=self.dp_size,
            dp_rank=self.dp_rank,
            need_eager=is_profile,
            dp_sync_state=sync,
        )
        if self.decode_cudagraph_manager is not None:
            batch = self.decode_cudagraph_manager.specialize_spec_tokens(batch, k)
        recorded = batch.num_tokens if batch.cg_mode == CUDAGraphMode.FULL else 0
        self.adapters.begin([BASE] * num_reqs if dummy_run else self.adapter_ids, batch.num_tokens, recorded)
        decode = (
            self._fused_multi_step_decode if self.supports_decode_metadata_update else self._multi_step_decode
        )
        decode(
            num_reqs,
            dummy_run and skip_attn_for_dummy_run,
            batch,
            sync.num_tokens_across_dp if sync is not None else None,
            upper.clamp_max(longest),
            k,
        )
        self.adapters.end()
        return self.draft_tokens[:num_reqs]

    def _narrow(self, num_reqs: int, longest: int) -> int:
        """Takes what the window leaves out of the round's block table and sequence lengths.

        In place: captured graphs read both where they are. The runner gathers the table anew for each step of the
        target's, and slots are computed from the tables by request state.

        Args:
            longest: Tokens of the longest context, or more.

        Returns:
            The same of what is left.
        """
        if self.window is None or not reaches(self.window, longest):
            return longest
        (gid,) = {g.kv_cache_group_id for of_gid in self.attn_groups for g in of_gid}
        size = self.block_tables.block_sizes[gid]
        table = self.block_tables.input_block_tables[gid][:num_reqs]
        seq_lens = self.input_buffers.seq_lens[:num_reqs]
        gap = gaps(self.window, seq_lens - 1, size)  # the first draft's token is counted already
        table.copy_(without_gaps(self.window, table, gap, size))
        seq_lens -= gap * size
        return min(longest, longest_seen(self.window, size))

    def _begin(
        self,
        num_reqs: int,
        input_batch: InputBatch,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dummy_run: bool,
    ) -> None:
        """Fills the buffers draft step 0 reads: the sampled token of each request at P + 1, and its slots."""
        buffers = self.input_buffers
        idx_mapping = input_batch.idx_mapping[:num_reqs]
        draft_begin(
            torch.full_like(idx_mapping, -1) if dummy_run else idx_mapping,
            num_sampled,
            num_rejected,
            last_sampled.view(-1),
            input_batch.query_start_loc,
            input_batch.positions,
            input_batch.seq_lens,
            self.idx_mapping,
            buffers.input_ids,
            buffers.positions,
            buffers.seq_lens,
            buffers.query_start_loc,
            self._slots,
            self.max_model_len,
        )
        target_state = getattr(self, "model_state", None)  # not there while memory is profiled
        rope = getattr(target_state, "rope_state", None)
        if self.rotary is not None and rope is not None:
            self.rotary.begin(rope, idx_mapping)
        self.temperature.copy_(temperature)
        self.seeds.copy_(seeds)
        if self._samples_upstream:
            self.sample_src_positions.copy_(buffers.positions[: self.max_num_reqs])

"""SdfpProposer: drafts in vLLM's V1 runner with the target's kept layers over the target's KV cache.

Where things stand when `propose` is called: the target has computed positions 0..P of a request
(P the last accepted token's), and sampled the token of P + 1, which has no K/V yet. Draft step
j feeds one token per request at position P + 1 + j; its K/V goes to the slot of that position,
reserved by the scheduler's lookahead. The next verification recomputes every one of those slots
with all layers before anything reads them as committed. There is no draft prefill: past
positions already hold the target's own K/V.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sdfp_vllm.engine.draft.adapters import BASE, DraftAdapters
from sdfp_vllm.engine.draft.load import load_draft
from sdfp_vllm.engine.draft.window import WindowedMetadata, narrowed_layers, windowed
from sdfp_vllm.engine.drafting import Drafting
from sdfp_vllm.engine.upstream.compat import drafting_metadata
from sdfp_vllm.engine.upstream.symbols import (
    AttentionGroup,
    AttentionLayerBase,
    CommonAttentionMetadata,
    CUDAGraphMode,
    DraftModelProposer,
    KVCacheConfig,
    SamplingMetadata,
    UniformTypeKVCacheSpecs,
    VllmConfig,
    eagle_step_update_slot_mapping_and_metadata,
    get_layers_from_vllm_config,
    set_forward_context,
)
from sdfp_vllm.engine.v1.draft_step import DraftStep, draw_step
from sdfp_vllm.engine.v1.pacer import Pacer, Verified
from sdfp_vllm.engine.v1.positions import RotaryPositions
from sdfp_vllm.pacing.policy import DraftPolicy
from sdfp_vllm.plan.window import DraftWindow

_EMBEDDED = SimpleNamespace(get_token_id=lambda index: 0)


class SdfpProposer(DraftModelProposer):
    """A `DraftModelProposer` without a second model, a second KV cache or a first pass."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None):
        super().__init__(vllm_config=vllm_config, device=device, runner=runner)
        self.runner = runner
        # Buffers of the base class for hidden states and embeddings that no draft step here reads.
        self.hidden_states = self.inputs_embeds = None  # type: ignore[assignment]
        self.is_rejected_token_mask = self.is_masked_token_mask = None
        # The runner would gather the embeddings of the step's images for a draft's prefill, and end the engine where the
        # next image's are not there yet (0.32). There is no such prefill.
        self.supports_mm_inputs = False
        self.rotary: RotaryPositions | None = None
        if self.uses_mrope:  # the base has a buffer for rows of positions or one for places, we need both
            self.rotary = RotaryPositions(self.mrope_positions)
            self.positions = self.mrope_positions.new_zeros(self.max_positions)
        self._slots: dict[int, torch.Tensor] = {}
        self._padding: tuple[int, ...] = vllm_config.speculative_config.drafting.padding  # type: ignore[union-attr]
        self.pacer: Pacer | None = None
        self.window: DraftWindow | None = vllm_config.speculative_config.plan.view.window  # type: ignore[union-attr]
        self._narrowed: set[str] = set()  # attention layers that read through the window

    def _raise_if_mrope(self) -> None:
        """Nothing: what upstream's draft models lack is `RotaryPositions`."""

    def _warn_if_multimodal(self) -> None:
        """Nothing: a draft fed by text alone is whole, for images are in the KV cache already."""

    # ------------------------------------------------------------ set-up
    def load_model(self, target_model: nn.Module) -> None:
        """Builds the draft over `target_model`'s modules (see `load_draft`)."""
        self.model, self._draft_attn_layer_names = load_draft(self.vllm_config, target_model)
        config: Any = self.vllm_config.speculative_config
        self.adapters = DraftAdapters(target_model, self._padding, config.own_adapters)
        drafting: Drafting = config.drafting
        if drafting.by_request(self.vllm_config):
            assert drafting.pacing is not None
            policy = DraftPolicy(drafting.pacing, drafting.slots)
            alone = self.vllm_config.parallel_config.world_size == 1
            self.pacer = Pacer(policy, self.runner, copies=drafting.copies, timed=alone)

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """Makes attention metadata builders for the kept layers, per KV cache group, backend and window."""
        self._narrowed = narrowed_layers(self.window, self.vllm_config, self._draft_attn_layer_names)
        attention = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
        groups: dict[tuple, AttentionGroup] = {}
        for gid, group in enumerate(kv_cache_config.kv_cache_groups):
            block_size = (
                kernel_block_sizes[gid] if kernel_block_sizes and gid < len(kernel_block_sizes) else None
            )
            # Sorted, so that every tensor-parallel rank builds the same groups in the same order.
            for name in sorted(self._draft_attn_layer_names & set(group.layer_names)):
                spec = group.kv_cache_spec
                if isinstance(spec, UniformTypeKVCacheSpecs):
                    spec = spec.kv_cache_specs[name]
                backend = attention[name].get_attn_backend()
                key = (gid, backend.full_cls_name(), spec, name in self._narrowed)
                if key in groups:
                    groups[key].layer_names.append(name)
                    continue
                groups[key] = AttentionGroup(backend, [name], spec, gid)
                groups[key].create_metadata_builders(
                    self.vllm_config, self.device, kernel_block_size=block_size
                )
        self.draft_attn_groups = list(groups.values())
        self.kv_cache_gid = self.draft_attn_groups[0].kv_cache_group_id
        self.block_size = self.draft_attn_groups[0].kv_cache_spec.block_size
        self._by_gid: dict[int, list[AttentionGroup]] = defaultdict(list)
        for g in self.draft_attn_groups:
            self._by_gid[g.kv_cache_group_id].append(g)
        self._slots = {
            gid: torch.zeros(self.max_num_tokens, dtype=torch.int64, device=self.device)
            for gid in self._by_gid
        }

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        """Kept layers may lie in several groups (sliding and full attention); each has its own metadata."""

    @torch.inference_mode()
    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """One draft forward without attention metadata: compiles, captures, and shows its memory to profiling."""
        mode, padded, across_dp = self._determine_batch_execution_and_padding(
            num_tokens, use_cudagraphs=use_cudagraphs
        )
        slots = self._slots_by_layer(padded)
        self.adapters.begin([BASE], padded)
        self._forward(None, slots or slot_mappings or {}, padded, mode, across_dp)
        self.adapters.end()

    # ------------------------------------------------------------ drafting
    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: Any,
        gpu_input_batch: Any,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Upstream's, for batches with prompts of embeddings too: such a prompt's last token has no id to ask for.

        The id asked for stands in for the next token of a request in the middle of its prefill, whose drafts are
        thrown away.
        """
        known: Any = {
            name: requests[name] if requests[name].prompt_token_ids is not None else _EMBEDDED
            for name in gpu_input_batch.req_ids
        }
        return super().prepare_next_token_ids_padded(
            sampled_token_ids, known, gpu_input_batch, discard_request_mask
        )

    def propose(  # type: ignore[override]  # the runner takes lists as well
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor | list[list[int]]:
        """Drafts `num_speculative_tokens` (k >= 0) tokens per request, or as many as the pacer decides.

        Args:
            target_token_ids, target_positions: int [num_tokens], what the target just computed; positions are
                [rows, num_tokens] with M-RoPE.
            next_token_ids: int32 [batch], the token sampled after the last accepted one.
            token_indices_to_sample: int32 [batch], index of the last accepted token among
                `target_positions`; None when nothing was drafted in this step.
            num_rejected_tokens_gpu: int32 [batch], drafts rejected in this step, still counted
                in `common_attn_metadata.seq_lens`.

        Returns:
            int64 [batch, k] draft token ids, or one list per request where they are paced; their
            probabilities, where sampled, are kept for `take_last_draft_probs`.
        """
        self._last_draft_probs = None
        if self.rotary is not None:
            # All here counts places in the sequence, of which these rows say nothing.
            target_positions = self.runner.positions[: target_positions.shape[-1]]
            self.rotary.begin(self.runner.requests, self.runner.input_batch.req_ids)
        batch = common_attn_metadata.batch_size()
        last = token_indices_to_sample
        if last is None:
            last = common_attn_metadata.query_start_loc[1:] - 1
        paced = self.pacer is not None and self.pacer.paces(sampling_metadata)
        draft = partial(
            self._draft_steps,
            common_attn_metadata,
            target_positions[last],
            next_token_ids,
            num_rejected_tokens_gpu,
            sampling_metadata,
            with_confidence=paced,
        )
        if paced:
            verified = Verified.read(
                target_token_ids, target_positions, common_attn_metadata.query_start_loc, last, next_token_ids
            )
            drafts, self._last_draft_probs = self.pacer.propose(verified, draft, sampling_metadata)  # type: ignore[union-attr]
            self.adapters.end()
            return drafts
        taken = list(itertools.islice(draft(), num_speculative_tokens))
        self.adapters.end()
        if not taken:
            return next_token_ids.new_empty((batch, 0), dtype=torch.int64)
        if taken[0].probs is not None:
            self._last_draft_probs = torch.stack([step.probs for step in taken], dim=1).contiguous()  # type: ignore[misc]
        return torch.stack([step.tokens for step in taken], dim=1)

    def _draft_steps(
        self,
        cad: CommonAttentionMetadata,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        num_rejected: torch.Tensor | None,
        sampling: SamplingMetadata,
        whole: Sequence[bool] = (),
        *,
        with_confidence: bool,
    ) -> Iterator[DraftStep]:
        """Draft steps of the whole batch, each run when it is asked for.

        Args:
            positions: int64 [batch], of the last accepted tokens.
            tokens: int32 [batch], those sampled after them.
            whole: Which requests see all of their context, whatever the window; none where empty.
        """
        batch = len(tokens)
        groups = self._decode_metadata(cad, batch, num_rejected)
        adapters = self.runner.input_batch.request_lora_mapping[:batch].tolist()
        # The runner records graphs of drafts without adapters alone.
        mode, padded, across_dp = self._determine_batch_execution_and_padding(
            batch, use_cudagraphs=not (self.adapters.own and any(adapters))
        )
        if mode == CUDAGraphMode.NONE and batch <= len(self._padding):
            padded = max(padded, self._padding[batch - 1])
        self.adapters.begin(adapters, padded)
        slots = self._slots_by_layer(padded)
        tables = self.runner.input_batch.block_table
        windows = windowed(self.window, groups, {gid: tables[gid].block_size for gid in groups}, whole)
        for index in itertools.count(1):
            positions = self._advance(groups, positions, batch, padded)
            metadata = self._step_metadata(groups, windows, index)
            self.input_ids[:batch] = tokens
            hidden = self._forward(metadata, slots, padded, mode, across_dp)[:batch]
            if with_confidence:
                step = self._sample_with_confidence(hidden, sampling)
            else:
                step = DraftStep(*self._sample_draft_tokens(hidden, sampling), None)
            yield step
            tokens = step.tokens

    def _sample_with_confidence(self, hidden: torch.Tensor, sampling: SamplingMetadata) -> DraftStep:
        if self._is_sampled(sampling):
            return self._draw(hidden, sampling)
        draft: Any = self.model
        logits = draft.compute_logits(hidden).float()
        top, tokens = logits.max(-1)
        return DraftStep(tokens, None, (top - logits.logsumexp(-1)).exp())

    def _sample_draft_tokens(
        self, hidden_states: torch.Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Upstream's where all is greedy. Where not, drafts are drawn within their request's top-k and top-p, and
        from its own generator where it has a seed, so that it repeats.

        Returns:
            int64 [batch] tokens, and their distributions, float32 [batch, vocabulary], where sampled.
        """
        if not self._is_sampled(sampling_metadata):
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)
        step = self._draw(hidden_states, sampling_metadata)
        return step.tokens, step.probs

    def _is_sampled(self, sampling: SamplingMetadata) -> bool:
        """Whether drafts of this batch are drawn from distributions."""
        return self._enable_probabilistic_draft_probs and not sampling.all_greedy

    def _draw(self, hidden: torch.Tensor, sampling: SamplingMetadata) -> DraftStep:
        draft: Any = self.model
        return draw_step(draft.compute_logits(hidden), sampling)

    def _decode_metadata(
        self, cad: CommonAttentionMetadata, batch: int, num_rejected: torch.Tensor | None
    ) -> dict[int, CommonAttentionMetadata]:
        """Copies the target's metadata into one-query-per-request metadata for each KV cache group.

        Copies, because the step below counts in place and the runner still owns the originals.
        """
        seq_lens = cad.seq_lens if num_rejected is None else cad.seq_lens - num_rejected
        query_start_loc_cpu = torch.arange(batch + 1, dtype=torch.int32)
        upper = cad.seq_lens_cpu_upper_bound
        return {
            gid: replace(
                cad,
                num_actual_tokens=batch,
                max_query_len=1,
                query_start_loc=self.arange[: batch + 1],
                query_start_loc_cpu=query_start_loc_cpu,
                seq_lens=seq_lens.clone(),
                seq_lens_cpu_upper_bound=None if upper is None else upper.clone(),
                block_table_tensor=self.runner.input_batch.block_table[gid].get_device_tensor(batch),
                slot_mapping=self._slots[gid][:batch],
            )
            for gid in self._by_gid
        }

    def _step_metadata(
        self,
        groups: dict[int, CommonAttentionMetadata],
        windows: dict[int, WindowedMetadata],
        index: int,
    ) -> dict[str, Any]:
        """What the attention of draft step `index` (from 1) is run with, by layer name."""
        metadata: dict[str, Any] = {}
        for gid, cad in groups.items():
            for group in self._by_gid[gid]:
                narrowed = gid in windows and group.layer_names[0] in self._narrowed
                seen = windows[gid].at(cad, index) if narrowed else cad
                metadata |= dict.fromkeys(group.layer_names, drafting_metadata(group, seen, index))
        return metadata

    def _advance(
        self, groups: dict[int, CommonAttentionMetadata], positions: torch.Tensor, batch: int, padded: int
    ) -> torch.Tensor:
        """Moves every request one position on, in each group; returns the new positions, int64 [batch].

        Past the model's maximum length a position is clamped and its K/V written nowhere.
        """
        max_model_len = self.runner.max_model_len  # read late: it may be fitted to memory after set-up
        for gid, cad in groups.items():
            eagle_step_update_slot_mapping_and_metadata(
                positions_1d=positions,
                block_table_tensor=cad.block_table_tensor,
                seq_lens=cad.seq_lens,
                block_size=self.runner.input_batch.block_table[gid].block_size,
                max_model_len=max_model_len,
                out_clamped_positions=self.positions[:batch],
                out_slot_mapping=self._slots[gid][:padded],
                input_batch_size=padded,
            )
            cad.max_seq_len = min(cad.max_seq_len + 1, max_model_len)
            if cad.seq_lens_cpu_upper_bound is not None:
                cad.seq_lens_cpu_upper_bound += 1
        if self.rotary is not None:
            self.rotary.follow(self.positions[:batch])
        return self.positions[:batch].clone()

    def _slots_by_layer(self, padded: int) -> dict[str, torch.Tensor]:
        """Views of the slot buffers, int64 [padded], as the forward context wants them; none before the cache exists."""
        return {
            name: self._slots[g.kv_cache_group_id][:padded]
            for g in self.draft_attn_groups
            for name in g.layer_names
        }

    def _forward(
        self,
        metadata: dict[str, Any] | None,
        slots: dict[str, torch.Tensor],
        padded: int,
        mode: CUDAGraphMode,
        across_dp: torch.Tensor | None,
    ) -> torch.Tensor:
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=padded,
            num_tokens_across_dp=across_dp,
            cudagraph_runtime_mode=mode,
            slot_mapping=slots,
        ):
            positions = self.rotary.first(padded) if self.rotary else self.positions[:padded]
            return self.model(input_ids=self.input_ids[:padded], positions=positions)

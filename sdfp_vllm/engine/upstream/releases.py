"""Refuses vLLM releases that were not tried, before a weight is read.

vLLM's internals are not an API. A release that was never run here may well start, and end at its first request;
so the release must be one that was tried, and every symbol we build on must be where `SYMBOLS` says. What ran on
which release is in `docs/reference/versions.md`; what each symbol is for in `docs/reference/upstream.md`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from typing import Any

import sdfp_vllm
from sdfp_vllm.errors import SdfpError

# Minor releases, the first one tried and the first one not; pyproject.toml promises the same range.
FIRST, BEYOND = (0, 31), (0, 33)
TRIED = "vllm>={}.{},<{}.{}".format(*FIRST, *BEYOND)
# vLLM's V2 model runner was another one before.
FIRST_V2 = (0, 32)
# LoRA adapters were tried on these alone: the first, and the first that was not.
FIRST_ADAPTERS, BEYOND_ADAPTERS = (0, 32), (0, 33)

# By part: "engine" is needed wherever we draft, "cpu" on that platform, "media" for a model that takes images, "v2" where
# that runner runs, "rounded" where a plan rounds weights, "adapters" with "_cpu" and "_v2" where LoRA is on, "serve" for Ray
# Serve replicas. By module: names, with a method or a field after a dot and the parameters we pass by name in brackets.
# One more module after "|" is where a release has them instead.
SYMBOLS: dict[str, dict[str, list[str]]] = {
    "engine": {
        "vllm.engine.arg_utils": [
            "EngineArgs.create_engine_config",
            "EngineArgs.download_dir",
            "EngineArgs.load_format",
            "EngineArgs.revision",
        ],
        "vllm.config": [
            "CUDAGraphMode.NONE",
            "CUDAGraphMode.decode_mode",
            "VllmConfig.num_lookahead_tokens",
            "VllmConfig.use_v2_model_runner",
            "get_current_vllm_config_or_none",
            "get_layers_from_vllm_config",
        ],
        "vllm.config.speculative": [
            "SpeculativeConfig.compute_hash",
            "SpeculativeConfig.draft_sample_method",
            "SpeculativeConfig.max_num_new_slots_for_drafting",
            "SpeculativeConfig.num_speculative_tokens_per_batch_size",
            "SpeculativeConfig.rejection_sample_method",
            "SpeculativeConfig.target_model_config",
            "SpeculativeConfig.target_parallel_config",
            "SpeculativeConfig.uses_draft_model",
            "SpeculativeConfig.uses_dynamic_speculative_decoding",
        ],
        "vllm.config.utils": ["config"],
        "vllm.config.vllm": ["EagleModelTypes"],
        "vllm.compilation.backends": ["set_model_tag"],
        "vllm.compilation.decorators": ["support_torch_compile(dynamic_arg_dims)"],
        "vllm.exceptions": ["VLLMValidationError"],
        "vllm.forward_context": [
            "set_forward_context(num_tokens, num_tokens_across_dp, cudagraph_runtime_mode, slot_mapping)"
        ],
        "vllm.logger": ["init_logger"],
        "vllm.platforms": ["current_platform.is_cpu"],
        "vllm.model_executor.layers.attention_layer_base": [
            "AttentionLayerBase.get_attn_backend",
            "AttentionLayerBase.get_kv_cache_spec",
        ],
        "vllm.model_executor.layers.layernorm": ["GemmaRMSNorm", "RMSNorm"],
        "vllm.model_executor.layers.linear": ["UnquantizedLinearMethod.process_weights_after_loading"],
        "vllm.model_executor.layers.vocab_parallel_embedding": [
            "UnquantizedEmbeddingMethod.apply",
            "UnquantizedEmbeddingMethod.process_weights_after_loading",
        ],
        "vllm.v1.attention.backend": [
            "AttentionMetadataBuilder.build_for_drafting(common_attn_metadata, draft_index)",
            "CommonAttentionMetadata.batch_size",
            "CommonAttentionMetadata(query_start_loc, query_start_loc_cpu, seq_lens, seq_lens_cpu_upper_bound, "
            "num_actual_tokens, max_query_len, max_seq_len, block_table_tensor, slot_mapping)",
        ],
        "vllm.v1.core.sched.scheduler": [
            "Scheduler.make_spec_decoding_stats(num_draft_tokens, num_accepted_tokens, request_id)",
            "Scheduler.make_stats",
            "Scheduler.schedule",
            "Scheduler.update_draft_token_ids(draft_token_ids)",
        ],
        "vllm.v1.engine.input_processor": ["InputProcessor._validate_params(params)"],
        "vllm.v1.kv_cache_interface": ["FullAttentionSpec", "KVCacheConfig.kv_cache_groups", "UniformTypeKVCacheSpecs.kv_cache_specs"],
        "vllm.v1.metrics.loggers": ["PrometheusStatLogger.record(scheduler_stats, engine_idx)"],
        "vllm.v1.metrics.stats": ["SchedulerStats"],
        "vllm.v1.sample.metadata": ["SamplingMetadata(temperature, all_greedy, all_random, top_p, top_k, generators)"],
        "vllm.v1.sample.logits_processor.builtin": [
            "MinTokensLogitsProcessor.apply_with_spec_decode(num_draft_tokens)",
            "process_dict_updates",
        ],
        "vllm.v1.sample.rejection_sampler": [
            "RejectionSampler._get_logprobs_tensors(max_num_logprobs, metadata)",
            "RejectionSampler.forward(metadata, draft_probs, logits, sampling_metadata)",
        ],
        "vllm.v1.sample.thinking_budget_state": [
            "ThinkingBudgetStateHolder.__init__(reasoning_config, max_num_seqs, num_spec_tokens, device, is_pin_memory)",
            "ThinkingBudgetStateHolder._init_state_entry",
            "ThinkingBudgetStateHolder._update_think_state(state)",
            "ThinkingBudgetStateHolder.apply_to_logits(logits, predict_bonus_token, spec_token_ids)",
            "ThinkingBudgetStateHolder.update_state(output_token_ids, spec_token_ids, repeat_indices)",
        ],
        "vllm.v1.spec_decode.draft_model": [
            "DraftModelProposer.__init__(vllm_config, device, runner)",
            "DraftModelProposer._determine_batch_execution_and_padding(use_cudagraphs)",
            "DraftModelProposer._sample_draft_tokens",
            "DraftModelProposer.dummy_run(use_cudagraphs, is_graph_capturing, slot_mappings)",
            "DraftModelProposer.initialize_attn_backend",
            "DraftModelProposer.load_model",
            "DraftModelProposer.prepare_next_token_ids_padded"
            "(sampled_token_ids, requests, gpu_input_batch, discard_request_mask)",
            "DraftModelProposer.propose(num_speculative_tokens, token_indices_to_sample, num_rejected_tokens_gpu)",
            "DraftModelProposer.take_last_draft_probs",
            "DraftModelProposer.validate_same_kv_cache_group",
        ],
        "vllm.v1.spec_decode.dynamic.utils": ["validate_and_normalize_dynamic_sd_schedule"],
        "vllm.v1.spec_decode.utils": [
            "eagle_step_update_slot_mapping_and_metadata(positions_1d, block_table_tensor, seq_lens, block_size, "
            "max_model_len, out_clamped_positions, out_slot_mapping, input_batch_size)"
        ],
        "vllm.v1.worker.gpu_input_batch": [
            "maybe_create_thinking_budget_state_holder(reasoning_config, max_num_seqs, num_spec_tokens)"
        ],
        "vllm.v1.worker.utils": [
            "AttentionGroup.create_metadata_builders(kernel_block_size)",
            "AttentionGroup.get_metadata_builder",
        ],
    },
    "cpu": {
        "vllm.v1.sample.rejection_sampler": [
            "apply_top_k_top_p",
            "expand_batch_to_tokens(x, cu_num_tokens, num_tokens, replace_from, replace_to)",
        ],
    },
    "media": {
        "vllm.config": [
            "ModelConfig.architecture",
            "ModelConfig.is_multimodal_model",
            "ModelConfig.mrope_num_dims",
            "ModelConfig.uses_mrope",
        ],
        "vllm.config.multimodal": [
            "MultiModalConfig.is_multimodal_pruning_enabled",
            "MultiModalConfig.language_model_only",
        ],
        "vllm.multimodal.inputs": [
            "MultiModalFeatureSpec.mm_position",
            "PlaceholderRange.length",
            "PlaceholderRange.offset",
        ],
        "vllm.v1.spec_decode.draft_model": [
            "DraftModelProposer._raise_if_mrope",
            "DraftModelProposer._warn_if_multimodal",
        ],
        "vllm.v1.worker.gpu_input_batch": [
            "CachedRequestState.mm_features",
            "CachedRequestState.mrope_position_delta",
        ],
    },
    "v2": {
        "vllm.forward_context": ["BatchDescriptor(num_tokens)"],
        "vllm.v1.spec_decode.dynamic.utils": [
            "build_dynamic_sd_schedule_lookup(vllm_max_batch_size, vllm_num_speculative_tokens)"
        ],
        "vllm.v1.worker.gpu.attn_utils": ["build_slot_mappings_by_layer"],
        "vllm.v1.worker.gpu.cudagraph_utils": ["CudaGraphManager.capture(create_forward_fn)"],
        "vllm.v1.worker.gpu.dp_utils": [
            "DPSyncState.num_reqs",
            "dispatch_cg_and_sync_dp(uniform_token_count, dp_size, dp_rank, need_eager, dp_sync_state)",
        ],
        "vllm.v1.worker.gpu.input_batch": ["InputBatch.seq_lens_cpu_upper_bound"],
        "vllm.v1.worker.gpu.mm.rope": ["RopeState"],
        "vllm.v1.worker.gpu.spec_decode": ["init_speculator"],
        "vllm.v1.worker.gpu.spec_decode.speculator": ["DraftModelSpeculator._configure_decode_metadata_update"],
        "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils": [
            "SpeculatorBatchDescriptor(num_speculative_tokens)",
            "SpeculatorCudaGraphManager.capture(progress_bar_desc)",
            "SpeculatorCudaGraphManager.run_fullgraph",
            "SpeculatorCudaGraphManager.specialize_spec_tokens",
        ],
        "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator": [
            "TargetDependentARSpeculator._build_uniform_attn_metadata"
            "(num_reqs, batch_desc, num_query_per_req, seq_lens_cpu_upper_bound, step)",
            "TargetDependentARSpeculator._build_uniform_batch_dp_sync",
            "TargetDependentARSpeculator._fused_multi_step_decode",
            "TargetDependentARSpeculator._generate_draft",
            "TargetDependentARSpeculator._generate_fused_drafts",
            "TargetDependentARSpeculator._multi_step_decode",
            "TargetDependentARSpeculator._run_model",
            "TargetDependentARSpeculator._update_draft_decode_metadata",
            "TargetDependentARSpeculator.capture",
            "TargetDependentARSpeculator.compute_draft_logits",
            "TargetDependentARSpeculator.init_cudagraph_manager",
            "TargetDependentARSpeculator.load_draft_model",
            "TargetDependentARSpeculator.propose"
            "(dp_sync_state, dummy_run, skip_attn_for_dummy_run, is_profile, num_speculative_tokens)",
            "TargetDependentARSpeculator.set_attn",
        ],
        "vllm.v1.worker.utils": ["AttentionGroup.map_to_kernel_block_table"],
    },
    "rounded": {
        "vllm.config": [
            "CompilationConfig",
            "CompilationMode",
            "VllmConfig",
            "get_current_vllm_config_or_none",
            "set_current_vllm_config",
        ],
        "vllm.model_executor.kernels.linear": [
            "MPLinearLayerConfig(full_weight_shape, partition_weight_shape, weight_type, act_type, group_size, "
            "zero_points)",
            "choose_mp_linear_kernel",
            "init_fp8_linear_kernel(activation_quant_key, weight_quant_key, input_dtype, out_dtype, weight_shape)",
            "init_int8_linear_kernel(is_channelwise, is_static_input_scheme, input_symmetric, module_name)",
            "init_mxfp4_linear_kernel(activation_quant_key)",
        ],
        "vllm.model_executor.layers.quantization.utils.quant_utils": [
            "kFp8DynamicTokenSym",
            "kFp8StaticChannelSym",
            "kMxfp4Dynamic",
        ],
        "vllm.model_executor.parameter": ["GroupQuantScaleParameter", "PackedvLLMParameter"],
        "vllm.platforms": ["current_platform.fp8_dtype", "current_platform.import_kernels"],
        "vllm.scalar_type": ["scalar_types.uint4b8"],
    },
    "adapters": {
        "vllm.lora.layers": ["LoRAMapping(index_mapping, prompt_mapping, is_prefill)"],
        "vllm.lora.layers.base": ["BaseLayerWithLoRA"],
        "vllm.lora.layers.logits_processor": [
            "LogitsProcessorWithLoRA.reset_lora(index)",
            "LogitsProcessorWithLoRA.set_lora(index, lora_a, lora_b)",
        ],
        "vllm.lora.model_manager": ["LoRAModelManager.set_adapter_mapping(mapping)"],
    },
    "adapters_cpu": {
        "vllm.lora.ops.torch_ops.lora_ops": [
            "bgmv_expand(inputs, lora_indices_tensor)",
            "bgmv_expand_slice(inputs, lora_indices_tensor)",
            "bgmv_shrink(inputs, lora_indices_tensor)",
        ],
        "vllm.lora.punica_wrapper.punica_cpu": ["bgmv_expand", "bgmv_expand_slice", "bgmv_shrink"],
    },
    "adapters_v2": {
        "vllm.v1.worker.gpu.lora_utils": ["LoraState.make_lora_inputs(req_ids, idx_mapping, num_scheduled_tokens)"],
        "vllm.v1.worker.gpu.model_runner": ["GPUModelRunner.prepare_inputs"],
    },
    "serve": {
        "vllm.entrypoints.launchers.api_server.app_state": ["init_app_state"],
        "vllm.entrypoints.launchers.api_server.entry": ["build_async_engine_client"],
        "vllm.entrypoints.launchers.app": ["build_app"],
        "vllm.entrypoints.launchers.cli_args | vllm.entrypoints.common.cli_args": ["make_arg_parser"],
        "vllm.utils.argparse_utils": ["FlexibleArgumentParser"],
    },
}  # fmt: skip

# How to go on without a part.
WITHOUT = {
    "media": "Serve the model without SDFP, or install another of them.",
    "v2": "Set VLLM_USE_V2_MODEL_RUNNER=0, or install another of them.",
    "rounded": "Draft at full precision (--precision full), or install another of them.",
    **dict.fromkeys(
        ("adapters", "adapters_cpu", "adapters_v2"),
        "Merge the adapter into the weights, or serve without SDFP.",
    ),
}


def release() -> str:
    """Returns the version of the vLLM that is installed."""
    import vllm

    return str(vllm.__version__)


def check_release() -> None:
    """Raises SdfpError if the installed vLLM was not tried, or lacks what drafts are built on here."""
    if not FIRST <= minor() < BEYOND:
        raise untried("is of a release that was not tried")
    refuse_missing("engine")
    if module_of("vllm.platforms").current_platform.is_cpu():
        refuse_missing("cpu")


def check_v2_release(adapters: bool = False) -> None:
    """Raises SdfpError if the installed vLLM has not the V2 model runner that was tried, or not with LoRA adapters."""
    if minor() < FIRST_V2:
        raise untried(
            "has another V2 model runner than drafts are built for",
            "Set VLLM_USE_V2_MODEL_RUNNER=0, or install vllm>={}.{}.".format(*FIRST_V2),
        )
    refuse_missing("v2")
    if adapters:
        refuse_missing("adapters_v2")


def check_adapters_release() -> None:
    """Raises SdfpError if LoRA adapters were not tried with the installed vLLM."""
    if not FIRST_ADAPTERS <= minor() < BEYOND_ADAPTERS:
        raise SdfpError(
            "--enable-lora",
            f"drafts with adapters were tried on vLLM {'.'.join(map(str, FIRST_ADAPTERS))} alone, and this is {release()}",
            "Merge the adapter into the weights, install that release, or serve without SDFP.",
        )
    refuse_missing("adapters")
    if module_of("vllm.platforms").current_platform.is_cpu():
        refuse_missing("adapters_cpu")


def minor() -> tuple[int, ...]:
    """Returns the minor release that is installed, (0, 32) for 0.32.1; (0, 0) for one that does not say."""
    found = re.match(r"(\d+)\.(\d+)", release())
    return tuple(map(int, found.groups())) if found else (0, 0)


@functools.cache
def refuse_missing(part: str) -> None:
    """Raises SdfpError for the first symbol of a part that is not where `SYMBOLS` says; once seen, all is well."""
    for where, names in SYMBOLS[part].items():
        module = module_of(where, WITHOUT.get(part))
        for name in names:
            if why := _missing(module, name):
                raise untried(f"{why} in {module.__name__}", WITHOUT.get(part))


def module_of(where: str, way_out: str | None = None) -> Any:
    """Imports the module of a row of `SYMBOLS`; of two, the one this release has."""
    first, *others = where.split(" | ")
    for name in [first, *others]:
        try:
            return importlib.import_module(name)
        except ImportError as e:
            problem = e
    raise untried(f"has no module {first} to import ({problem})", way_out) from problem


def untried(what: str, way_out: str | None = None) -> SdfpError:
    """The one refusal of this vLLM: `what` follows its name and version."""
    return SdfpError(
        f"vLLM {release()} with sdfp-vllm {sdfp_vllm.__version__}",
        f"this vLLM {what}; tried are {TRIED}",
        way_out or f"Install one of them (pip install '{TRIED}'), or another sdfp-vllm.",
    )


def _missing(module: Any, entry: str) -> str | None:
    """What a row's entry lacks, if anything."""
    name, _, listed = entry.rstrip(")").partition("(")
    found = module
    for part in name.split("."):
        # A field without a default is no attribute of its class.
        if part not in getattr(found, "__dataclass_fields__", {}) and not hasattr(found, part):
            return f"lacks {name}"
        found = getattr(found, part, None)
    if listed:
        known = inspect.signature(found).parameters
        if gone := [p for p in listed.split(", ") if p not in known]:
            return f"lacks the parameter {gone[0]} of {name}"
    return None

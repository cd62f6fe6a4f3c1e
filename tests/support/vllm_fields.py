"""What becomes of each field that vLLM 0.32 has for requests and for engines, with SDFP.

By verdict: "works" names the test file that has the field on a real engine, and the same answers as without drafts;
"refused" says by whom; "irrelevant" says why drafts cannot notice it.
"""

from __future__ import annotations

SAMPLING_PARAMS = {
    "works: tests/engine_v1/test_request_fields.py": """
        logprob_token_ids flat_logprobs thinking_token_budget min_tokens stop include_stop_str_in_output
        skip_special_tokens spaces_between_special_tokens detokenize repetition_detection skip_reading_prefix_cache
        stream_interval max_tokens ignore_eos
    """,
    "works: tests/engine_v1/test_greedy_features.py": """
        n stop_token_ids bad_words allowed_token_ids repetition_penalty presence_penalty frequency_penalty
        structured_outputs logprobs prompt_logprobs
    """,
    "works: tests/engine_v1/test_request_limits.py": "extra_args",
    "works: tests/engine_v1/test_sampling.py": "temperature top_k top_p seed",
    "refused: by vLLM, per request, with any speculative method": "min_p logit_bias trace_decode_token_ids",
    "refused: by vLLM, for an engine without --enable-return-routed-experts, which SDFP refuses": """
        routed_experts_prompt_start
    """,
    "irrelevant: scores of the prompt, which is not drafted; refused by vLLM on the V1 runner": """
        prompt_logprob_token_ids prompt_logprob_start
    """,
    "irrelevant: without a watermark_config, which vLLM refuses with SDFP, a warning": "watermarking",
    "irrelevant: how outputs are handed over": "output_kind skip_clone",
    "irrelevant: computed by vLLM from the fields above": "output_text_buffer_length",
}

# Fields of the routes below that have not the name of a sampling parameter.
ROUTES = {
    "works: tests/engine_v1/test_request_fields.py": "prompt_embeds use_beam_search",
    "works: tests/e2e/test_serve.py": "model prompt stream vllm_xargs",
    "irrelevant: other names for a sampling parameter above": """
        max_completion_tokens max_output_tokens top_logprobs response_format text echo include
    """,
    "irrelevant: makes the prompt": """
        tools tool_choice parallel_tool_calls max_tool_calls reasoning reasoning_effort documents chat_template
        chat_template_kwargs add_generation_prompt continue_final_message add_special_tokens truncate_prompt_tokens
        truncation_side truncation media_io_kwargs mm_processor_kwargs mm_payload input instructions suffix
        previous_response_id previous_input_messages messages
    """,
    "irrelevant: which request runs first, and what prefix it may share": """
        priority request_id session_id cache_salt prompt_cache_key
    """,
    "irrelevant: what of the answer is shown": """
        stream_options include_reasoning return_tokens_as_token_ids return_token_ids return_token_offsets
        return_prompt_text return_mm_kwargs enable_response_messages user metadata store background service_tier
    """,
    "irrelevant: ranks the beams that test_request_fields.py searches": "length_penalty",
    "irrelevant: for connectors, which SDFP refuses": "kv_transfer_params ec_transfer_params",
}

ENGINE_ARGS = {
    "works: tests/support/engines.py": """
        model dtype max_model_len max_num_seqs enforce_eager disable_log_stats distributed_executor_backend
        kv_cache_memory_bytes speculative_config
    """,
    "works: tests/engine_v1/test_request_fields.py": "enable_prompt_embeds reasoning_config max_logprobs",
    "works: tests/engine_v1/test_greedy.py": "enable_prefix_caching num_gpu_blocks_override max_num_batched_tokens",
    "works: tests/engine_v1/test_greedy_features.py": "async_scheduling",
    "works: tests/engine_v1/test_request_limits.py": "per_request_spec_decode_metrics",
    "works: tests/engine_v1/test_settings_grid.py": "block_size",
    "works: tests/engine_v1/test_sampling.py": "seed skip_tokenizer_init",
    "works: tests/engine_v1/test_quantised.py": "kv_cache_dtype",
    "works: tests/engine_v1/test_tensor_parallel.py": "tensor_parallel_size",
    "works: tests/engine_v1/test_lora.py": "enable_lora max_loras max_lora_rank",
    "works: tests/engine_v1/test_lora_families.py": "max_cpu_loras",
    "works: tests/engine_v1/test_model_sources.py": "revision download_dir load_format",
    "works: tests/unit/engine/test_arguments.py": "spec_method spec_model spec_tokens",
    "works: tests/e2e/test_serve.py": "served_model_name",
    "works: tests/engine_v2/test_graphs.py": "compilation_config cudagraph_capture_sizes max_cudagraph_capture_size",
    "refused: by SDFP at start-up": """
        pipeline_parallel_size decode_context_parallel_size prefill_context_parallel_size kv_transfer_config
        kv_offloading_size enable_eplb enable_return_routed_experts aux_output_config offload_group_size
        offload_backend enable_dbo ubatch_size runner model_weights hf_config_path enable_tower_connector_lora
    """,
    "refused: by vLLM at start-up, with SDFP or with any speculative method": """
        logits_processors watermark_config
    """,
    "refused: elastic expert parallelism needs --enable-eplb": "enable_elastic_ep elastic_ep_max_dp_size",
    "irrelevant: of a feature that is refused": """
        max_lora_cls_labels eplb_config kv_offloading_backend dcp_comm_backend dcp_q_replicate
        dcp_kv_cache_interleave_size cp_kv_cache_interleave_size offload_num_in_group offload_prefetch_step
        offload_params dbo_decode_token_threshold dbo_prefill_token_threshold convert pooler_config diffusion_config
    """,
    "irrelevant: how an adapter is kept and multiplied; drafts run the target's layers with it": """
        default_mm_loras fully_sharded_loras lora_dtype lora_target_modules specialize_active_lora
        enable_mixed_moe_lora_format enable_moe_shared_loras
    """,
    "irrelevant: of models that are refused (mamba, linear attention, encoder-decoder, K/V of another layer)": """
        mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend
        enable_mamba_shared_prefix_checkpoint replayssm_buffer_len use_replayssm mamba_ssu_algorithm
        enable_mamba_cache_stochastic_rounding mamba_cache_philox_rounds gdn_prefill_backend kda_prefill_backend
        kda_decode_backend kv_sharing_fast_prefill
    """,
    "irrelevant: of models SDFP cannot draft with, refused when they are loaded": """
        engram_config enable_hc_sp swa_bounded_replay sparse_indexer_topk_backend
    """,
    "irrelevant: where the model and its weights come from; the plan's fingerprint is checked": """
        code_revision hf_token hf_overrides config_format
        model_class_overrides model_impl trust_remote_code safetensors_load_strategy
        safetensors_prefetch_num_threads safetensors_prefetch_block_size model_loader_extra_config ignore_patterns
        max_parallel_loading_workers use_tqdm_on_load pt_load_map_location enable_ep_weight_filter
        weight_transfer_config
    """,
    "irrelevant: how the target computes; drafts run its own modules": """
        quantization quantization_config allow_deprecated_quantization attention_backend attention_config
        kernel_config moe_backend linear_backend ir_op_priority enable_flashinfer_autotune kv_cache_dtype_skip_layers
        disable_sliding_window disable_cascade_attn optimization_level performance_mode additional_config
        disable_custom_all_reduce cpu_offload_gb cpu_offload_params expert_placement_strategy
        enable_expert_parallel all2all_backend
    """,
    "irrelevant: tokens and prompts before they reach the engine": """
        tokenizer tokenizer_mode tokenizer_revision generation_config override_generation_config
        allowed_local_media_path allowed_media_domains language_model_only limit_mm_per_prompt enable_mm_embeds
        interleave_mm_strings media_io_kwargs mm_processor_kwargs mm_processor_cache_gb mm_processor_cache_type
        mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode
        mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_path
        mm_encoder_fp8_scale_save_margin io_processor_plugin renderer_num_workers skip_mm_profiling
        video_pruning_rate video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb
        mm_device_do_normalize disable_chunked_mm_input enable_mm_processor_stats ec_transfer_config
        ec_manager_config tokens_only enable_shm_tensor_arena
    """,
    "irrelevant: which request is computed when; drafts follow whatever batch there is": """
        scheduling_policy scheduler_cls max_num_scheduled_tokens max_num_active_seqs max_num_queued_reqs
        max_num_queued_tokens long_prefill_token_threshold long_prefill_token_threshold_adaptive
        enable_chunked_prefill scheduler_reserve_full_isl prefill_schedule_interval watermark stream_interval
        disable_hybrid_kv_cache_manager
    """,
    "irrelevant: how prefixes are kept; drafts are never published to the prefix cache": """
        prefix_caching_hash_algo prefix_cache_retention_interval prefix_match_unit kv_events_config
    """,
    "irrelevant: where processes run, and how they find each other": """
        master_addr master_port nnodes node_rank distributed_timeout_seconds cpu_distributed_timeout_seconds
        numa_bind numa_bind_nodes numa_bind_cpus device_ids data_parallel_size data_parallel_rank
        data_parallel_start_rank data_parallel_size_local data_parallel_address data_parallel_rpc_port
        data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb
        data_parallel_backend dp_sync_interval disable_nccl_for_dp_synchronization worker_cls worker_extension_cls
        ray_workers_use_nsight gpu_memory_utilization enable_sleep_mode sleep_mode_offload_cudagraph
        sleep_preserve_parameter_names enable_cumem_allocator enable_nccl_comm_suspend fault_tolerance_config
        enable_fault_tolerance shutdown_timeout fail_on_environ_validation
    """,
    "irrelevant: what is measured and logged": """
        aggregate_engine_logging show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
        kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets
        cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details
        jit_monitor_mode jit_monitor_verbose profiler_config logging_config log_level log_config_file
        enable_log_requests
    """,
    "irrelevant: how what was sampled is checked and shown; upstream's sampler does it after verification": """
        structured_outputs_config reasoning_parser reasoning_parser_plugin logprobs_mode use_fp64_gumbel
        enable_batch_sharded_sampling return_sampling_mask
    """,
    "irrelevant: asked of requests with trace_decode_token_ids, which vLLM refuses with drafts": """
        enable_trace_replay
    """,
}

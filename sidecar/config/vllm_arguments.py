"""The arguments of ``vllm serve`` in vLLM 0.32, by the kind of their value.

Read from vLLM's own parser, with which tests/real_vllm/test_init_round_trip.py compares them. Other versions may have
more or fewer, so an unknown name is no mistake by itself.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum

VLLM_VERSION = "0.32"


class ValueKind(StrEnum):
    """What an argument takes, as worded in messages."""

    SWITCH = "true or false"  # --name and --no-name
    FLAG = "true"  # --name only
    INTEGER = "a whole number"
    SIZE = 'a whole number, or a text such as "8k"'
    NUMBER = "a number"
    TEXT = "a text or a number"
    LIST = "a list"
    REPEATED = "a text"  # may be given several times
    JSON = "a mapping or a list"


_NAMES: Mapping[ValueKind, str] = {
    ValueKind.SWITCH: """
        allow_credentials allow_deprecated_quantization async_scheduling cohere_is_reasoning_model
        cudagraph_metrics data_parallel_external_lb data_parallel_hybrid_lb dcp_q_replicate
        disable_cascade_attn disable_chunked_mm_input disable_custom_all_reduce disable_fastapi_docs
        disable_hybrid_kv_cache_manager disable_nccl_for_dp_synchronization disable_sliding_window
        disable_uvicorn_access_log enable_auto_tool_choice enable_batch_sharded_sampling
        enable_chunked_prefill enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter
        enable_eplb enable_expert_parallel enable_fault_tolerance enable_flash_late_interaction
        enable_flashinfer_autotune enable_force_include_usage enable_hc_sp enable_layerwise_nvtx_tracing
        enable_log_deltas enable_log_outputs enable_log_requests enable_logging_iteration_details
        enable_lora enable_mamba_cache_stochastic_rounding enable_mamba_shared_prefix_checkpoint
        enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds enable_moe_shared_loras
        enable_nccl_comm_suspend enable_offline_docs enable_per_request_metrics enable_prefix_caching
        enable_prompt_embeds enable_prompt_tokens_details enable_request_id_headers
        enable_return_routed_experts enable_scale_out enable_server_load_tracking enable_shm_tensor_arena
        enable_sleep_mode enable_ssl_refresh enable_tokenizer_info_endpoint enable_tower_connector_lora
        enable_trace_replay enforce_eager exclude_tools_when_tool_choice_none fail_on_environ_validation
        fully_sharded_loras interleave_mm_strings jit_monitor_verbose kv_cache_metrics
        kv_sharing_fast_prefill language_model_only log_error_stack long_prefill_token_threshold_adaptive
        mm_device_do_normalize mm_encoder_only numa_bind ray_workers_use_nsight return_sampling_mask
        return_tokens_as_token_ids scheduler_reserve_full_isl skip_mm_profiling skip_tokenizer_init
        sleep_mode_offload_cudagraph specialize_active_lora swa_bounded_replay tokens_only trust_remote_code
        trust_request_chat_template trust_request_mm_kwargs use_fp64_gumbel use_replayssm use_tqdm_on_load
    """,
    ValueKind.FLAG: """
        aggregate_engine_logging data_parallel_multi_port_external_lb disable_log_stats grpc headless
    """,
    ValueKind.INTEGER: """
        api_server_count block_size cp_kv_cache_interleave_size data_parallel_rank data_parallel_rpc_port
        data_parallel_size data_parallel_size_local data_parallel_start_rank data_parallel_supervisor_port
        dbo_decode_token_threshold dbo_prefill_token_threshold dcp_kv_cache_interleave_size
        decode_context_parallel_size dp_supervisor_probe_failure_threshold dp_sync_interval
        elastic_ep_max_dp_size h11_max_header_count h11_max_incomplete_event_size
        long_prefill_token_threshold mamba_cache_philox_rounds master_port max_cudagraph_capture_size
        max_logprobs max_lora_rank max_loras max_num_seqs mm_shm_cache_max_object_size_mb nnodes node_rank
        offload_group_size offload_num_in_group offload_prefetch_step pipeline_parallel_size port
        prefill_context_parallel_size prefill_schedule_interval renderer_num_workers replayssm_buffer_len
        safetensors_prefetch_num_threads seed shutdown_timeout spec_tokens sse_keep_alive_interval
        ssl_cert_reqs stream_interval tensor_parallel_size ubatch_size
    """,
    ValueKind.SIZE: """
        kv_cache_memory_bytes max_model_len max_num_batched_tokens safetensors_prefetch_block_size
    """,
    ValueKind.NUMBER: """
        cpu_offload_gb dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s gpu_memory_utilization
        kv_cache_metrics_sample mm_encoder_fp8_scale_save_margin mm_ipc_gpu_memory_gb mm_processor_cache_gb
        watermark
    """,
    ValueKind.TEXT: """
        all2all_backend allowed_local_media_path anthropic_disabled_thinking_effort attention_backend
        chat_template chat_template_content_format code_revision cohere_format config config_format convert
        cpu_distributed_timeout_seconds custom_histogram_buckets data_parallel_address data_parallel_backend
        dcp_comm_backend device_ids disable_access_log_for_endpoints distributed_executor_backend
        distributed_timeout_seconds download_dir dtype expert_placement_strategy fingerprint_mode
        fingerprint_value gdn_prefill_backend generation_config grpc_port hf_config_path hf_token host
        io_processor_plugin jit_monitor_mode kda_decode_backend kda_prefill_backend kv_cache_dtype
        kv_offloading_backend kv_offloading_size linear_backend load_format log_config_file log_level
        logprobs_mode lora_dtype mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode
        mamba_ssm_cache_dtype mamba_ssu_algorithm master_addr max_cpu_loras max_log_len max_lora_cls_labels
        max_num_active_seqs max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens
        max_parallel_loading_workers mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path
        mm_encoder_fp8_scale_save_path mm_encoder_tp_mode mm_hasher_algorithm mm_processor_cache_type
        mm_processor_device mm_tensor_ipc model model_impl moe_backend num_gpu_blocks_override
        offload_backend optimization_level otlp_traces_endpoint per_request_spec_decode_metrics
        performance_mode prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit
        quantization reasoning_parser reasoning_parser_plugin response_role revision root_path runner
        safetensors_load_strategy scheduler_cls scheduling_policy show_hidden_metrics_for_version
        sparse_indexer_topk_backend spec_method spec_model ssl_ca_certs ssl_certfile ssl_ciphers ssl_keyfile
        tokenizer tokenizer_mode tokenizer_revision tool_call_parser tool_parser_plugin tool_server
        tool_strict_level uds uvicorn_log_level video_pruning_method video_pruning_rate worker_cls
        worker_extension_cls
    """,
    ValueKind.LIST: """
        allowed_media_domains api_key collect_detailed_traces cpu_offload_params cudagraph_capture_sizes
        ignore_patterns kv_cache_dtype_skip_layers logits_processors lora_modules lora_target_modules
        numa_bind_cpus numa_bind_nodes offload_params served_model_name sleep_preserve_parameter_names
    """,
    ValueKind.REPEATED: """
        middleware
    """,
    ValueKind.JSON: """
        additional_config allowed_headers allowed_methods allowed_origins attention_config aux_output_config
        compilation_config default_chat_template_kwargs default_mm_loras diffusion_config ec_manager_config
        ec_transfer_config engram_config eplb_config fault_tolerance_config hf_overrides ir_op_priority
        kernel_config kv_events_config kv_transfer_config limit_mm_per_prompt logging_config media_io_kwargs
        mm_processor_kwargs model_class_overrides model_loader_extra_config override_generation_config
        pooler_config profiler_config pt_load_map_location quantization_config reasoning_config
        speculative_config structured_outputs_config watermark_config weight_transfer_config
    """,
}
VLLM_ARGUMENTS: Mapping[str, ValueKind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}
# Of the options with a single dash.
SHORT_NAMES: Mapping[str, str] = {
    "ac": "attention_config",
    "asc": "api_server_count",
    "cc": "compilation_config",
    "dc": "diffusion_config",
    "dcp": "decode_context_parallel_size",
    "dp": "data_parallel_size",
    "dpa": "data_parallel_address",
    "dpb": "data_parallel_backend",
    "dpe": "data_parallel_external_lb",
    "dph": "data_parallel_hybrid_lb",
    "dpl": "data_parallel_size_local",
    "dpm": "data_parallel_multi_port_external_lb",
    "dpn": "data_parallel_rank",
    "dpp": "data_parallel_rpc_port",
    "dpr": "data_parallel_start_rank",
    "ep": "enable_expert_parallel",
    "n": "nnodes",
    "pcp": "prefill_context_parallel_size",
    "pp": "pipeline_parallel_size",
    "q": "quantization",
    "r": "node_rank",
    "sc": "speculative_config",
    "tp": "tensor_parallel_size",
}
OTHER_NAMES: Mapping[str, str] = {"device_memory_utilization": "gpu_memory_utilization"}
# Arguments of earlier versions whose names begin like newer ones.
_FORMER = frozenset({"device"})


def completions(name: str) -> tuple[str, ...]:
    """The arguments that vLLM's parser takes the unknown ``name`` for: it accepts any unambiguous prefix."""
    if name in VLLM_ARGUMENTS or name in OTHER_NAMES or name in _FORMER or not name:
        return ()
    found: Iterable[str] = (OTHER_NAMES.get(known, known) for known in (*VLLM_ARGUMENTS, *OTHER_NAMES))
    return tuple(dict.fromkeys(known for known in found if known.startswith(name)))


def dashed(name: str) -> str:
    """The name as on the command line, without its dashes in front: "max-num-seqs"."""
    base, dot, rest = name.partition(".")
    return base.replace("_", "-") + dot + rest

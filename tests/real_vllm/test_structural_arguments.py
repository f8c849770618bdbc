"""Every argument of the installed vLLM is classified: it changes the model, enters the arithmetic, or does neither."""

import dataclasses
from typing import Any

import pytest

from vllm_sloguard.guard.known_model import STRUCTURAL_ARGUMENTS, structural
from vllm_sloguard.guard.rules.arguments import ARGUMENTS

pytestmark = pytest.mark.timeout(300)

# They serve, observe, schedule, or place buffers that the profile run does not count.
NEUTRAL = frozenset(
    """
    additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization
    allowed_local_media_path allowed_media_domains async_scheduling attention_config aux_output_config
    code_revision collect_detailed_traces compilation_config config_format cp_kv_cache_interleave_size
    cpu_distributed_timeout_seconds cpu_offload_params cudagraph_capture_sizes cudagraph_metrics
    custom_histogram_buckets data_parallel_address data_parallel_backend data_parallel_external_lb
    data_parallel_hybrid_lb data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
    data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold dbo_prefill_token_threshold
    dcp_comm_backend dcp_q_replicate default_mm_loras device_ids diffusion_config disable_cascade_attn
    disable_chunked_mm_input disable_custom_all_reduce disable_log_stats disable_nccl_for_dp_synchronization
    distributed_executor_backend distributed_timeout_seconds download_dir dp_sync_interval ec_manager_config
    ec_transfer_config elastic_ep_max_dp_size enable_batch_sharded_sampling enable_cumem_allocator enable_dbo
    enable_elastic_ep enable_ep_weight_filter enable_fault_tolerance enable_flashinfer_autotune enable_hc_sp
    enable_layerwise_nvtx_tracing enable_logging_iteration_details enable_mamba_cache_stochastic_rounding
    enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds enable_mm_processor_stats
    enable_nccl_comm_suspend enable_prompt_embeds enable_return_routed_experts enable_shm_tensor_arena
    enable_sleep_mode enable_tower_connector_lora enable_trace_replay engram_config eplb_config
    expert_placement_strategy fail_on_environ_validation fault_tolerance_config gdn_prefill_backend
    generation_config hf_token ignore_patterns interleave_mm_strings io_processor_plugin ir_op_priority
    jit_monitor_mode jit_monitor_verbose kda_decode_backend kda_prefill_backend kernel_config kv_cache_metrics
    kv_cache_metrics_sample kv_events_config kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill
    kv_transfer_config load_format log_config_file log_level logging_config logits_processors logprobs_mode
    long_prefill_token_threshold_adaptive mamba_backend mamba_cache_philox_rounds mamba_config mamba_ssu_algorithm
    master_addr master_port max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_cls_labels
    max_num_active_seqs max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens
    max_parallel_loading_workers media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend
    mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin
    mm_encoder_fp8_scale_save_path mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb
    mm_processor_cache_gb mm_processor_cache_type mm_processor_device mm_shm_cache_max_object_size_mb
    mm_tensor_ipc model model_class_overrides model_loader_extra_config model_weights nnodes node_rank numa_bind
    numa_bind_cpus numa_bind_nodes offload_params offload_prefetch_step optimization_level otlp_traces_endpoint
    override_generation_config per_request_spec_decode_metrics performance_mode pooler_config
    prefill_schedule_interval prefix_cache_retention_interval prefix_caching_hash_algo profiler_config
    pt_load_map_location ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin
    renderer_num_workers return_sampling_mask revision safetensors_load_strategy safetensors_prefetch_block_size
    safetensors_prefetch_num_threads scheduler_cls scheduler_reserve_full_isl scheduling_policy seed
    served_model_name show_hidden_metrics_for_version shutdown_timeout skip_mm_profiling skip_tokenizer_init
    sleep_mode_offload_cudagraph sleep_preserve_parameter_names sparse_indexer_topk_backend specialize_active_lora
    structured_outputs_config tokenizer tokenizer_mode tokenizer_revision tokens_only ubatch_size use_fp64_gumbel
    use_tqdm_on_load video_pruning_method video_pruning_rate watermark watermark_config weight_transfer_config
    worker_cls worker_extension_cls
    """.split()  # noqa: SIM905 - two hundred names
)


def defaults() -> dict[str, Any]:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    found: dict[str, Any] = {}
    for field in dataclasses.fields(arg_utils.EngineArgs):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return {name: value for name, value in found.items() if not name.startswith("_")}


def test_each_is_classified() -> None:
    assert defaults().keys() - STRUCTURAL_ARGUMENTS.keys() - ARGUMENTS.keys() - NEUTRAL == set()
    assert not NEUTRAL & STRUCTURAL_ARGUMENTS.keys()


def test_defaults_are_vllms() -> None:
    """A default given explicitly must not be built again."""
    assert {name: value for name, value in defaults().items() if structural({name: value})} == {}

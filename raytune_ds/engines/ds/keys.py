"""What DeepSpeed knows: its keys, section by section, and the kind of value that each takes."""

from __future__ import annotations

AUTO = "auto"
ZERO = "zero_optimization"


def _keys(**kinds: str) -> dict[str, str]:
    """Key to the kind of its value."""
    return {key: kind for kind, keys in kinds.items() for key in keys.split()}


# Every key that DeepSpeed 0.19 reads, from its source: runtime/config.py and runtime/constants.py, monitor/config.py,
# elasticity, profiling, autotuning, nebula, datastates, compression, runtime/data_pipeline; and of older files
# quantize_training, eigenvalue, allgather_size. A test asks an installed DeepSpeed which keys it looks for.
TOP_KEYS = _keys(
    whole="train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps vocabulary_size allgather_size "
    "sequence_parallel_size data_parallel_size",
    number="gradient_clipping gradient_predivide_factor",
    flag="prescale_gradients sparse_gradients disable_allgather dump_state graph_harvesting memory_breakdown "
    "wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer dataloader_drop_last "
    "use_data_before_expert_parallelism",
    text="communication_data_type seq_parallel_communication_data_type",
    section="zero_optimization bf16 fp16 amp torch_autocast optimizer scheduler aio activation_checkpointing "
    "comms_logger flops_profiler tensorboard wandb csv_monitor comet autotuning compression_training "
    "quantize_training curriculum_learning data_efficiency elasticity eigenvalue progressive_layer_drop "
    "hybrid_engine sparse_attention pipeline checkpoint data_types nebula weight_quantization compile timers "
    "tensor_parallel",
    anything="steps_per_print datastates_ckpt",
)

# The fields of DeepSpeedZeroConfig (runtime/zero/config.py) by name and by alias; it refuses all others.
ZERO_KEYS = _keys(
    whole="stage reduce_bucket_size allgather_bucket_size sub_group_size prefetch_bucket_size "
    "stage3_prefetch_bucket_size param_persistence_threshold stage3_param_persistence_threshold "
    "model_persistence_threshold stage3_model_persistence_threshold max_live_parameters "
    "stage3_max_live_parameters max_reuse_distance stage3_max_reuse_distance module_granularity_threshold "
    "stage3_module_granularity_threshold zero_hpz_partition_size",
    number="mics_shard_size",
    flag="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
    "load_from_fp32_weights elastic_checkpoint cpu_offload cpu_offload_param cpu_offload_use_pin_memory "
    "gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save "
    "stage3_gather_fp16_weights_on_model_save use_all_reduce_for_fetch_params "
    "stage3_use_all_reduce_for_fetch_params allgather_sequential stage3_allgather_sequential "
    "ignore_unused_parameters legacy_stage1 round_robin_gradients zero_quantized_weights "
    "zero_quantized_nontrainable_weights zero_quantized_gradients mics_hierarchical_params_gather "
    "memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
    "enable_sanity_checks save_muon_momentum_buffer_in_memory",
    section="offload_param offload_optimizer zenflow zeropp_loco_param leaf_module",
)

# The sections whose keys are looked at: runtime/zero/offload_config.py, runtime/precision_config.py,
# runtime/swap_tensor/aio_config.py. All other sections are passed on as they stand.
SECTIONS = {
    "": TOP_KEYS,
    ZERO: ZERO_KEYS,
    f"{ZERO}.offload_optimizer": _keys(
        text="device nvme_path",
        whole="buffer_count",
        number="ratio cpuadam_cores_perc",
        flag="pin_memory pipeline_read pipeline_write fast_init super_offload",
    ),
    f"{ZERO}.offload_param": _keys(
        text="device nvme_path", whole="buffer_count buffer_size max_in_cpu", flag="pin_memory"
    ),
    "bf16": _keys(
        flag="enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "aio": _keys(
        whole="block_size queue_depth intra_op_parallelism", flag="single_submit overlap_events use_gds"
    ),
    "optimizer": _keys(text="type", section="params", flag="legacy_fusion"),
    "scheduler": _keys(text="type", section="params"),
}
OPTIMIZER_PARAMS = _keys(
    number="lr eps weight_decay max_grad_norm",
    list="betas",
    flag="torch_adam adam_w_mode bias_correction amsgrad maximize fp32_optimizer_states set_grad_none fused foreach "
    "capturable differentiable",
)
SCHEDULER_PARAMS = _keys(number="warmup_min_lr warmup_max_lr", whole="warmup_num_steps total_num_steps")

"""DeepSpeed's documented keys with their defaults, written down apart from the tables that they test."""

INFINITY = float("inf")

# fmt: off
TOP = {
    "train_batch_size": None, "train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": None,
    "managed_gradient_accumulation": True, "steps_per_print": None, "wall_clock_breakdown": False,
    "memory_breakdown": False, "dump_state": False, "log_level": None, "disable_python_gc": False,
    "dataloader_drop_last": False, "disable_allgather": False, "vocabulary_size": None,
    "gradient_clipping": 1.0, "prescale_gradients": False, "gradient_predivide_factor": 1.0,
    "gradient_allreduce_op": "mean", "communication_data_type": None,
    "seq_parallel_communication_data_type": "fp32", "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True, "sequence_parallel_size": None, "data_parallel_size": None,
    "use_data_before_expert_parallelism": False, "optimizer": None, "scheduler": None,
    "datastates_ckpt": None, "weight_quantization": None,
    # removed upstream, as old files still send them
    "nebula": {"enabled": False}, "compression_training": {"weight_quantization": {"enabled": False}},
    "amp": {"enabled": False}, "quantize_training": {"enabled": False}, "sparse_gradients": False,
    "eigenvalue": {"enabled": False}, "sparse_attention": None, "elasticity": {"enabled": False},
    "graph_harvesting": False, "curriculum_learning": {"enabled": False, "min_difficulty": 8},
    "progressive_layer_drop": {"enabled": False, "theta": 0.5},
}

SECTIONS = {
    "timers": {"throughput": {"enabled": True, "synchronized": True}},
    "optimizer": {"type": "Adam", "params": {}, "legacy_fusion": False},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "data_types": {
        "grad_accum_dtype": None, "param_dtype": None, "buffer_dtype": None, "keep_in_fp32_modules": "auto"},
    "fp16": {
        "enabled": False, "auto_cast": False, "loss_scale": 0, "initial_scale_power": 16,
        "loss_scale_window": 1000, "hysteresis": 2, "consecutive_hysteresis": False, "min_loss_scale": 1,
        "fp16_master_weights_and_grads": False},
    "bf16": {
        "enabled": False, "immediate_grad_update": False, "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False},
    "torch_autocast": {"enabled": False, "dtype": None, "lower_precision_safe_modules": None},
    "zero_optimization": {
        "stage": 0, "contiguous_gradients": True, "reduce_scatter": True, "reduce_bucket_size": 5e8,
        "use_multi_rank_bucket_allreduce": True, "allgather_partitions": True, "allgather_bucket_size": 5e8,
        "overlap_comm": None, "load_from_fp32_weights": True, "elastic_checkpoint": False,
        "offload_param": {
            "device": "none", "nvme_path": None, "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9,
            "pin_memory": True},
        "offload_optimizer": {
            "device": "none", "nvme_path": None, "buffer_count": 4, "pin_memory": True,
            "pipeline_read": False, "pipeline_write": False, "fast_init": False, "ratio": 1.0,
            "super_offload": False, "cpuadam_cores_perc": 0.8},
        "zenflow": None, "sub_group_size": 1e9, "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": 1e5, "stage3_model_persistence_threshold": 2**63 - 1,
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": False, "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False, "stage3_allgather_sequential": False,
        "ignore_unused_parameters": True, "legacy_stage1": False, "round_robin_gradients": False,
        "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False, "zero_quantized_gradients": False,
        "memory_efficient_linear": True, "pipeline_loading_checkpoint": False, "override_module_apply": True,
        "log_trace_cache_warnings": False, "enable_sanity_checks": False,
        "save_muon_momentum_buffer_in_memory": False,
        "leaf_module": {"classes": ["a.MoE"], "names": [], "name_suffixes": []}, "compute_grad_norm": True,
        "parameter_alignment": False, "cpu_offload": False, "cpu_offload_param": False,
        "cpu_offload_use_pin_memory": None,
        "mics_shard_size": -1, "mics_hierarchical_params_gather": False, "zeropp_loco_param": None},
    "aio": {
        "block_size": 1048576, "queue_depth": 8, "intra_op_parallelism": 1, "thread_count": 1,
        "single_submit": False, "overlap_events": True, "use_gds": False},
    "activation_checkpointing": {
        "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
        "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False},
    "checkpoint": {
        "tag_validation": "Warn", "load_universal": False, "use_node_local_storage": False,
        "parallel_write": {"pipeline_stage": False}, "checkpoint_serialization": True, "writer": None},
    "pipeline": {
        "stages": "auto", "partition": "best", "seed_layers": False, "activation_checkpoint_interval": 0,
        "pipe_partitioned": True, "grad_partitioned": True, "use_reentrant": True},
    "tensor_parallel": {
        "autotp_size": 0, "dtype": "fp16", "tp_overlap_comm": False, "vocab_parallel_lm_head": None,
        "vocab_parallel_ce_backend": "torch", "tp": {"tp_size": 1, "tp_grain_size": 1},
        "partition_config": None, "preset_model": None, "injection_policy_tuple": None,
        "keep_module_on_host": False, "kernel_inject": False},
    "expert_parallel": {
        "enabled": False, "autoep_size": 1, "expert_tensor_parallel_size": 1, "preset_model": None,
        "use_grouped_mm": True, "disable_triton_grouped_mm": False, "moe_layer_pattern": None,
        "router_pattern": None, "expert_pattern": None, "score_func": "auto", "score_apply": "auto",
        "route_norm": None, "route_scale": 1.0, "top_k": "auto", "routed_scaling_factor": "auto",
        "num_expert_groups": None, "num_limited_groups": None, "load_balance_coeff": None, "expert_w1": None,
        "expert_w2": None, "expert_w3": None, "num_experts_attr": None, "top_k_attr": None,
        "has_shared_experts": None, "shared_experts_pattern": None, "comm_backend": None},
    "compile": {
        "deepcompile": False, "autoep_non_moe": False, "free_activation": False,
        "free_activation_threshold": 10485760, "offload_activation": False,
        "offload_activation_pin_memory": True, "offload_opt_states": False, "double_buffer": True,
        "symmetric_memory": False, "debug_log": False, "offload_parameters": False,
        "sync_before_reduce": False, "sync_after_reduce": False, "sync_before_allgather": False,
        "sync_after_allgather": False, "keep_int_input_tensors": True, "keep_all_input_tensors": False,
        "passes": None},
    "data_efficiency": {
        "enabled": False, "seed": 1234, "data_routing": {"enabled": False, "random_ltd": {"enabled": False}},
        "data_sampling": {"enabled": False, "num_epochs": 1000, "num_workers": 0}},
    "tensorboard": {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
    "csv_monitor": {"enabled": False, "output_path": "", "job_name": "DeepSpeedJobName"},
    "wandb": {"enabled": False, "group": None, "team": None, "project": "deepspeed"},
    "comet": {
        "enabled": False, "samples_log_interval": 100, "project": None, "workspace": None, "api_key": None,
        "experiment_name": None, "experiment_key": None, "online": None, "mode": None},
    "flops_profiler": {
        "enabled": False, "recompute_fwd_factor": 0.0, "profile_step": 1, "module_depth": -1,
        "top_modules": 1, "detailed": True, "output_file": None},
    "comms_logger": {"enabled": False, "verbose": False, "prof_all": True, "debug": False, "prof_ops": []},
    "autotuning": {
        "enabled": False, "fast": True, "results_dir": None, "exps_dir": None, "overwrite": True,
        "start_profile_step": 3, "end_profile_step": 5, "metric": "throughput", "metric_path": None,
        "tuner_type": "gridsearch", "tuner_early_stopping": 5, "tuner_num_trials": 50, "arg_mappings": None,
        "model_info": None, "model_info_path": None, "mp_size": 1, "max_train_batch_size": None,
        "min_train_batch_size": 1, "max_train_micro_batch_size_per_gpu": 1024,
        "min_train_micro_batch_size_per_gpu": 1, "num_tuning_micro_batch_sizes": 3},
    "hybrid_engine": {
        "enabled": False, "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": False,
        "pin_parameters": True, "tp_gather_partition_size": 8, "enable_cuda_graph": False},
}

OTHER_NAMES = {
    "bfloat16": {"enabled": False},
    "zero_optimization": {"stage3_gather_fp16_weights_on_model_save": False},
}

# What the libraries that drive DeepSpeed configs send when their users ask for nothing special.
CLIENTS = {
    "accelerate": {
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": {"device": "none", "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_clipping": 1.0, "steps_per_print": INFINITY, "bf16": {"enabled": True},
        "fp16": {"enabled": False}, "zero_allow_untested_optimizer": True},
    "lightning": {
        "activation_checkpointing": {
            "partition_activations": False, "cpu_checkpointing": False,
            "contiguous_memory_optimization": False, "synchronize_checkpoint_boundary": False},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True,
                "thread_count": 1},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 2, "contiguous_gradients": True, "overlap_comm": True, "allgather_partitions": True,
            "reduce_scatter": True, "allgather_bucket_size": 200000000, "reduce_bucket_size": 200000000,
            "sub_group_size": 1000000000000},
        "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0,
        "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000,
                 "hysteresis": 2, "min_loss_scale": 1}},
    "trl": {
        "zero_optimization": {"stage": 3}, "zero_optimization.reduce_bucket_size": 16384,
        "zero_optimization.stage3_param_persistence_threshold": 1280,
        "zero_optimization.stage3_prefetch_bucket_size": 14745.6},
    "openrlhf": {
        "steps_per_print": 100, "bf16": {"enabled": True}, "prescale_gradients": False,
        "wall_clock_breakdown": False, "data_types": {"grad_accum_dtype": None},
        "zero_optimization": {
            "stage": 2, "offload_param": {"device": "none"}, "round_robin_gradients": True,
            "offload_optimizer": {"device": "none", "pin_memory": True}, "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False, "zero_quantized_gradients": False}},
}
# fmt: on

"""DeepSpeed's keys that zerolith does not act on, and what becomes of each. Data only."""

from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple


class Fate(Enum):
    """What a known key leads to."""

    IMPLEMENTED = "implemented"
    HINT = "hint"  # accepted, type-checked, without effect
    LATER = "not supported yet"  # accepted only at a value that asks for nothing
    REMOVED = "removed upstream"  # the same


class OneOf(NamedTuple):
    """The values that ask for nothing, the default first."""

    values: tuple[object, ...]


class Switch(NamedTuple):
    """An object whose inside is not ours: it asks for something unless empty or `enabled: false`."""


class Group(NamedTuple):
    """Keys of one section that share a fate and its reason.

    A key maps to its default, whose type is its type: 5 takes integers, 5.0 any number. `str`, `int`,
    ... stand for null or a value of that type, `object` for null or anything.
    """

    section: str
    fate: Fate
    why: str
    keys: Mapping[str, object]


ALIASES: Final = {
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}

# fmt: off
_HINT, _LATER, _REMOVED = Fate.HINT, Fate.LATER, Fate.REMOVED
_ZERO = "zero_optimization"

_ENGINE = (
    Group("", _HINT, "names a schema for editors", {"$schema": str}),
    Group("", _HINT, "parameters are always gathered", {"disable_allgather": False}),
    Group("", _HINT, "sizes need no alignment", {"vocabulary_size": int}),
    Group("", _HINT, "the application sets log levels through `logging`", {"log_level": str}),
    Group("", _HINT, "there is no list of tested optimizers", {"zero_allow_untested_optimizer": False}),
    Group("", _HINT, "there is one optimizer path on CPU and GPU", {"zero_force_ds_cpu_optimizer": True}),
    Group("", _HINT, "read with sequence parallelism only", {"seq_parallel_communication_data_type": "fp32"}),
    Group("", _HINT, "clients read it for inference", {"inference": dict}),
    Group("", _LATER, "the engine owns the accumulation boundary", {"managed_gradient_accumulation": True}),
    Group("", _LATER, "steps are not timed or dumped", {
        "wall_clock_breakdown": False, "memory_breakdown": False, "dump_state": False}),
    Group("", _LATER, "Python collects garbage as it likes", {"disable_python_gc": False}),
    Group("", _LATER, "gradients are averaged, in one division", {
        "prescale_gradients": False, "gradient_predivide_factor": 1.0, "gradient_allreduce_op": "mean"}),
    Group("", _LATER, "sequences are not split over ranks", {"sequence_parallel_size": OneOf((None, 1))}),
    Group("", _LATER, "the launcher's world size decides", {"data_parallel_size": OneOf((None,))}),
    Group("", _LATER, "experts are not split over ranks", {"use_data_before_expert_parallelism": False}),
    Group("timers.throughput", _HINT, "throughput is not timed", {"enabled": True, "synchronized": True}),
    Group("optimizer", _HINT, "fused arithmetic is chosen by device", {"legacy_fusion": False}),
    Group("torch_autocast", _LATER, "communication_data_type decides for all gradients", {
        "lower_precision_safe_modules": OneOf((None,)),
    }),
    Group("fp16", _LATER, "master weights are fp32", {"fp16_master_weights_and_grads": False}),
    Group("bf16", _LATER, "master weights and optimizer states are fp32", {
        "bf16_master_weights_and_grads": False, "bf16_optimizer_states": False}),
    Group("bf16", _LATER, "gradients add up when they arrive", {"immediate_grad_update": False}),
    Group("data_types", _LATER, "fp16, bf16 or torch_autocast choose it", {
        "param_dtype": OneOf((None,)), "buffer_dtype": OneOf((None,))}),
    Group("data_types", _LATER, "a model has one compute dtype", {
        "keep_in_fp32_modules": OneOf(("auto", []))}),
)

_SHARDING = (
    Group(_ZERO, _HINT, "gradients always lie in one buffer per unit", {"contiguous_gradients": True}),
    Group(_ZERO, _HINT, "the backend decides which collective moves the bytes", {
        "reduce_scatter": True, "use_multi_rank_bucket_allreduce": True, "allgather_partitions": True,
        "stage3_use_all_reduce_for_fetch_params": False, "stage3_allgather_sequential": False}),
    Group(_ZERO, _HINT, "a unit is gathered at once", {
        "allgather_bucket_size": 5e8, "stage3_module_granularity_threshold": 0}),
    Group(_ZERO, _HINT, "the optimizer steps unit by unit", {"sub_group_size": 1e9}),
    Group(_ZERO, _HINT, "a unit is released after its use", {
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_model_persistence_threshold": float}),
    Group(_ZERO, _HINT, "reductions have one order on all ranks", {"round_robin_gradients": False}),
    Group(_ZERO, _HINT, "unused parameters are always handled", {"ignore_unused_parameters": True}),
    Group(_ZERO, _HINT, "a checkpoint loads at every world size, masters included", {
        "elastic_checkpoint": False, "load_from_fp32_weights": True, "pipeline_loading_checkpoint": False}),
    Group(_ZERO, _HINT, "modules are not patched", {
        "memory_efficient_linear": True, "override_module_apply": True}),
    Group(_ZERO, _HINT, "checks are always on", {
        "log_trace_cache_warnings": False, "enable_sanity_checks": False}),
    Group(_ZERO, _HINT, "optimizer states stay on the device", {
        "save_muon_momentum_buffer_in_memory": False, "cpu_offload_use_pin_memory": object}),
    Group(_ZERO, _HINT, "the gradient norm is always computed", {"compute_grad_norm": True}),
    Group(_ZERO, _HINT, "layouts need no alignment", {"parameter_alignment": False}),
    Group(_ZERO, _LATER, "there is one stage 1", {"legacy_stage1": False}),
    Group(_ZERO, _LATER, "parameters and states stay on the device", {
        "cpu_offload": False, "cpu_offload_param": False, "zenflow": Switch()}),
    Group(_ZERO, _LATER, "parameters are sharded over all ranks", {"zero_hpz_partition_size": 1}),
    Group(_ZERO, _LATER, "weights and gradients travel unquantized", {
        "zero_quantized_weights": False, "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False}),
    Group(_ZERO, _REMOVED, "parameters are sharded over all ranks", {
        "mics_shard_size": -1, "mics_hierarchical_params_gather": False}),
    Group(_ZERO, _REMOVED, "weights and gradients travel unquantized", {"zeropp_loco_param": Switch()}),
    Group(f"{_ZERO}.offload_param", _LATER, "parameters stay on the device", {
        "device": "none"}),
    Group(f"{_ZERO}.offload_param", _HINT, "nothing is offloaded", {
        "nvme_path": str, "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9, "pin_memory": True}),
    Group(f"{_ZERO}.offload_optimizer", _LATER, "optimizer states stay on the device", {
        "device": "none"}),
    Group(f"{_ZERO}.offload_optimizer", _HINT, "nothing is offloaded", {
        "nvme_path": str, "buffer_count": 4, "buffer_size": 1e8, "max_in_cpu": 1e9, "pin_memory": True,
        "pipeline_read": False, "pipeline_write": False, "fast_init": False, "ratio": 1.0,
        "super_offload": False, "cpuadam_cores_perc": 0.8}),
    Group("aio", _HINT, "nothing is offloaded to NVMe", {
        "block_size": 1048576.0, "queue_depth": 8, "intra_op_parallelism": 1, "thread_count": 1,
        "single_submit": False, "overlap_events": True, "use_gds": False}),
)

_PARALLEL = (
    Group("activation_checkpointing", _LATER, "the model calls torch.utils.checkpoint itself", {
        "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
        "synchronize_checkpoint_boundary": False, "profile": False}),
    Group("activation_checkpointing", _HINT, "read with contiguous_memory_optimization only", {
        "number_checkpoints": int}),
    Group("pipeline", _LATER, "layers are not split over ranks", {"stages": OneOf(("auto", 1))}),
    Group("pipeline", _HINT, "read with pipeline parallelism only", {
        "partition": "best", "seed_layers": False, "activation_checkpoint_interval": 0,
        "pipe_partitioned": True, "grad_partitioned": True, "use_reentrant": True}),
    Group("tensor_parallel", _LATER, "tensors are not split over ranks", {"autotp_size": OneOf((0, 1))}),
    Group("tensor_parallel.tp", _LATER, "tensors are not split over ranks", {"tp_size": 1}),
    Group("tensor_parallel.tp", _HINT, "read with tensor parallelism only", {"tp_grain_size": 1}),
    Group("tensor_parallel", _HINT, "read with tensor parallelism only", dict.fromkeys((
        "dtype", "tp_overlap_comm", "vocab_parallel_lm_head", "vocab_parallel_ce_backend", "partition_config",
        "preset_model", "injection_policy_tuple", "keep_module_on_host", "kernel_inject"), object)),
    Group("expert_parallel", _LATER, "experts are not split over ranks", {"enabled": False}),
    Group("expert_parallel", _HINT, "read with expert parallelism only", dict.fromkeys((
        "autoep_size", "expert_tensor_parallel_size", "preset_model", "use_grouped_mm",
        "disable_triton_grouped_mm", "moe_layer_pattern", "router_pattern", "expert_pattern", "score_func",
        "score_apply", "route_norm", "route_scale", "top_k", "routed_scaling_factor", "num_expert_groups",
        "num_limited_groups", "load_balance_coeff", "expert_w1", "expert_w2", "expert_w3", "num_experts_attr",
        "top_k_attr", "has_shared_experts", "shared_experts_pattern", "comm_backend"), object)),
    Group("compile", _LATER, "use torch.compile or engine.compile", {
        "deepcompile": False, "autoep_non_moe": False}),
    Group("compile", _HINT, "read with deepcompile only", {
        "free_activation": False, "free_activation_threshold": 10485760.0, "offload_activation": False,
        "offload_activation_pin_memory": True, "offload_opt_states": False, "double_buffer": True,
        "symmetric_memory": False, "debug_log": False, "offload_parameters": False,
        "sync_before_reduce": False, "sync_after_reduce": False, "sync_before_allgather": False,
        "sync_after_allgather": False, "keep_int_input_tensors": True, "keep_all_input_tensors": False,
        "passes": list}),
    Group("checkpoint", _HINT, "ranks always agree on the tag", {
        "tag_validation": OneOf(("Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL"))}),
    Group("checkpoint", _HINT, "there is one checkpoint format", {"checkpoint_serialization": True}),
    Group("checkpoint", _LATER, "there is one checkpoint format, and it needs no conversion", {
        "load_universal": False, "writer": Switch()}),
    Group("checkpoint", _LATER, "a checkpoint lies on storage that all ranks share", {
        "use_node_local_storage": False}),
    Group("checkpoint.parallel_write", _LATER, "layers are not split over ranks", {"pipeline_stage": False}),
    Group("", _LATER, "there is one checkpoint format", {"datastates_ckpt": Switch()}),
)

_DISABLED = "read only when enabled"

_TOOLS = (
    *(Group(tool, _LATER, why, {"enabled": False}) for tool, why in {
        "tensorboard": "metrics go to the caller", "csv_monitor": "metrics go to the caller",
        "wandb": "metrics go to the caller", "comet": "metrics go to the caller",
        "flops_profiler": "use torch.profiler", "comms_logger": "use torch.profiler",
        "autotuning": "settings are not searched", "hybrid_engine": "training only",
        "data_efficiency": "data is read in the sampler's order",
    }.items()),
    Group("tensorboard", _HINT, _DISABLED, {"output_path": "", "job_name": "DeepSpeedJobName"}),
    Group("csv_monitor", _HINT, _DISABLED, {"output_path": "", "job_name": "DeepSpeedJobName"}),
    Group("wandb", _HINT, _DISABLED, {"group": str, "team": str, "project": "deepspeed"}),
    Group("comet", _HINT, _DISABLED, {
        "samples_log_interval": 100, "project": str, "workspace": str, "api_key": str,
        "experiment_name": str, "experiment_key": str, "online": bool, "mode": str}),
    Group("flops_profiler", _HINT, _DISABLED, {
        "recompute_fwd_factor": 0.0, "profile_step": 1, "module_depth": -1, "top_modules": 1,
        "detailed": True, "output_file": str}),
    Group("comms_logger", _HINT, _DISABLED, {
        "verbose": False, "prof_all": True, "debug": False, "prof_ops": []}),
    Group("autotuning", _HINT, _DISABLED, {
        "fast": True, "results_dir": str, "exps_dir": str, "overwrite": True, "start_profile_step": 3,
        "end_profile_step": 5, "metric": "throughput", "metric_path": str, "tuner_type": "gridsearch",
        "tuner_early_stopping": 5, "tuner_num_trials": 50, "arg_mappings": dict, "model_info": dict,
        "model_info_path": str, "mp_size": 1, "max_train_batch_size": int, "min_train_batch_size": 1,
        "max_train_micro_batch_size_per_gpu": 1024, "min_train_micro_batch_size_per_gpu": 1,
        "num_tuning_micro_batch_sizes": 3}),
    Group("hybrid_engine", _HINT, _DISABLED, {
        "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": False,
        "pin_parameters": True, "tp_gather_partition_size": 8, "enable_cuda_graph": False}),
    Group("data_efficiency", _HINT, _DISABLED, {"seed": 1234, "data_routing": dict, "data_sampling": dict}),
    Group("", _LATER, "weights are not quantized", {"weight_quantization": Switch(), "msamp": Switch()}),
    Group("", _REMOVED, "gradients are dense", {"sparse_gradients": False}),
    Group("", _REMOVED, "nothing replaces it", dict.fromkeys((
        "nebula", "compression_training", "quantize_training", "eigenvalue", "sparse_attention",
        "elasticity", "curriculum_learning", "progressive_layer_drop"), Switch())),
    Group("", _REMOVED, "use torch.compile", {"graph_harvesting": False}),
    Group("", _REMOVED, "use fp16, bf16 or torch_autocast", {"amp": Switch()}),
)

GROUPS: Final = (*_ENGINE, *_SHARDING, *_PARALLEL, *_TOOLS)

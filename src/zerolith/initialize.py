"""From a model and a config to an engine, on every rank or on none."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zerolith import kernels
from zerolith.checkpoint import Disk, Preemption, probe
from zerolith.checkpointing import Options, checkpoint_blocks, configure
from zerolith.comm import TIMEOUT, Comm, agree, default_comm, handshake, init_distributed
from zerolith.config import Config, load_config, resolve_batch
from zerolith.data import Loader, make_loader
from zerolith.engine import Engine
from zerolith.errors import ConfigError, OptimizerError, UsageError
from zerolith.forward import Forward
from zerolith.member import Member
from zerolith.memory import keep_freed_pages
from zerolith.memory.offload import Offload
from zerolith.observe import Logs, Watch, make_monitors
from zerolith.optim import build_optimizer, build_scheduler, granularities_of
from zerolith.parameter import ShardedParameter
from zerolith.partitioning import SHARD, Partitioning
from zerolith.placement import Placement, check_room, make_placement
from zerolith.precision import LossScaler, Precision
from zerolith.section import Plan, weights_in
from zerolith.sharded_model import ShardedModel
from zerolith.wrap import WrapPolicy, find_members
from zerolith.zero.init import Origin
from zerolith.zero.marks import get_z3_leaf_modules
from zerolith.zero.owners import owner_of

logger = logging.getLogger("zerolith")

SHORT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LONG_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What this rank was given, checked; nothing has been sharded yet."""

    model: nn.Module
    config: Config
    optimizer: Optimizer | None
    members: list[Member]
    loader: Loader | None
    scheduler: Any  # anything with step(), or None
    watch: Watch
    preemption: Preemption | None
    placement: Placement


def initialize(
    args: Any = None,  # an argparse namespace or a dict, with deepspeed_config
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None = None,
    model_parameters: Iterable[Any] | None = None,  # tensors or group dicts
    training_data: Any = None,  # a torch Dataset
    lr_scheduler: Any = None,  # a scheduler, or a function of the optimizer that makes one
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Any = None,  # a dict, a path, or base64 of JSON
    config_params: Any = None,
    *,
    timeout: timedelta | None = None,
) -> tuple[Engine, Any, Any, Any]:
    """Shard `model` as the config says; returns (engine, optimizer, loader, scheduler), None where not asked for.

    Collective over all ranks, which must agree in config, versions and parameters; rank 0's weights and buffers
    are used everywhere. A given optimizer wins over the configured one, a given scheduler likewise. Joins the
    process group of the launcher's environment unless one exists or `dist_init_required` is False; without a
    launcher it runs as one process. Raises ConfigError, OptimizerError or HandshakeError, on every rank.
    """
    if dist_init_required is not False:
        init_distributed(timeout=timeout or TIMEOUT)
    comm = default_comm()
    inputs, error = None, None
    with ExitStack() as undo:  # if some rank fails
        try:
            source = _only_one(args, config, config_params)
            given = (model, optimizer, model_parameters, training_data, lr_scheduler, collate_fn)
            inputs = _check(source, *given, comm, undo)
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
        agree(comm, error, doing="zerolith.initialize")
        assert inputs is not None, "agree raises on every rank if any has failed"
        handshake(comm, _facts(inputs, comm))
        engine = _assemble(inputs)
        undo.pop_all()
    engine.training_dataloader = inputs.loader
    engine.lr_scheduler = inputs.scheduler
    engine._prepare_checkpoints(inputs.preemption)
    if comm.rank == 0:
        for note in inputs.config.notes:
            level = logging.WARNING if note.is_mistake else logging.INFO
            logger.log(level, "config: %s: %s", note.path, note.why)
        logger.info("%s", engine.summary())
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check(
    source: Any,
    model: nn.Module | None,
    optimizer: Any,
    model_parameters: Any,
    training_data: Any,
    lr_scheduler: Any,
    collate_fn: Any,
    comm: Comm,
    undo: ExitStack,
) -> _Inputs:
    """Everything that can be wrong on one rank alone is found here; `undo` closes what was opened for it."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"initialize: model must be a torch.nn.Module, not {type(model).__name__}")
    config = resolve_batch(load_config(source), comm.size)
    logs = Logs(config, comm)
    undo.callback(logs.remove)
    members = find_members(model, _member)
    _move(model, members, comm.device)
    chosen = _optimizer(model, optimizer, model_parameters, config, comm)
    if chosen is not None:
        _assign_groups(members, chosen, comm)
        if any(float(state.get("step", 0)) > 0 for state in chosen.state.values()):
            raise OptimizerError("the optimizer has stepped already; give initialize one without state")
    elif Partitioning.from_stage(config.zero_optimization.stage).shards_states_only:
        raise ConfigError(
            f"zero_optimization.stage: {config.zero_optimization.stage} shards optimizer states, but there is no "
            "optimizer; pass one to initialize or name one under optimizer.type"
        )
    loader = _loader(training_data, config, collate_fn, comm)
    scheduler = _scheduler(lr_scheduler, config, chosen, comm)
    check_room(config, members, _precision(config), chosen, comm)
    watch = _watch(config, comm, logs)
    undo.callback(watch.remove)
    return _Inputs(
        model=model,
        config=config,
        optimizer=chosen,
        members=members,
        loader=loader,
        scheduler=scheduler,
        watch=watch,
        preemption=_preemption(config, undo),
        placement=make_placement(config, comm.device, undo, trains=chosen is not None),
    )


def _preemption(config: Config, undo: ExitStack) -> Preemption | None:
    """See that checkpoints can be written where the config says, and catch the signal that ends the job."""
    settings = config.checkpoint
    if settings.folder:
        probe(Disk(), Path(settings.folder).absolute())
    if not settings.preemption.enabled:
        return None
    preemption = Preemption(deadline_s=settings.preemption.deadline_s)
    undo.callback(preemption.remove)
    return preemption


def _member(name: str, param: nn.Parameter) -> Member:
    """A member for a parameter as the model holds it: plain, or sharded under construction by zero.Init."""
    if owner_of(param) is not None:
        raise UsageError(f"{name!r} belongs to another engine already; call destroy() on that engine first")
    if not isinstance(param, ShardedParameter):
        return Member(name=name, param=param)
    if not isinstance(param.origin, Origin):
        raise UsageError(f"{name!r} is sharded by another engine; destroy() it or copy the model first")
    param.origin.param.requires_grad_(param.requires_grad)
    return Member(name=name, param=param.origin.param, whole=param.origin.whole, stand_in=param)


def _move(model: nn.Module, members: Sequence[Member], device: torch.device) -> None:
    if all(member.whole is None for member in members):
        model.to(device)
        return
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(device) if buffer is not None else None


def _only_one(args: Any, config: Any, config_params: Any) -> Any:
    from_args = args.get("deepspeed_config") if isinstance(args, Mapping) else getattr(args, "deepspeed_config", None)
    given = [source for source in (from_args, config, config_params) if source is not None]
    if len(given) != 1:
        problem = "no config" if not given else "more than one config"
        raise ConfigError(f"initialize: {problem}; pass exactly one of config=, config_params= and --deepspeed_config")
    return given[0]


def _optimizer(model: nn.Module, optimizer: Any, model_parameters: Any, config: Config, comm: Comm) -> Optimizer | None:
    groups = list(model_parameters) if model_parameters is not None else list(model.parameters())
    named = config.optimizer
    if optimizer is not None and named is not None and comm.rank == 0:
        logger.warning("an optimizer was passed and config names %r: the passed one is used", named.type)
    if optimizer is not None:
        is_factory = callable(optimizer) and not isinstance(optimizer, Optimizer)
        made = optimizer(groups) if is_factory else optimizer
        if not isinstance(made, Optimizer):
            what = "optimizer(...) returned" if is_factory else "optimizer is"
            raise OptimizerError(f"initialize: {what} a {type(made).__name__}, not a torch Optimizer")
        return made
    if named is None:
        return None
    trainable = [group for group in groups if isinstance(group, dict) or _tensor_of(group).requires_grad]
    if not trainable:
        raise ConfigError(f"optimizer.type: no parameter of the model is trainable, so {named.type!r} has none")
    return build_optimizer(named.type, named.params, trainable, model, in_one_pass=_in_one_pass(config, comm.device))


def _in_one_pass(config: Config, device: torch.device) -> bool:
    """Whether our kernels step what the config names: where they are fastest, and where two devices must agree."""
    if device.type == "cpu":
        return kernels.is_compiled()
    return config.reproducible or config.zero_optimization.offload_optimizer.device != "none"


def _tensor_of(named: Any) -> Any:  # a tensor, or a name and a tensor
    return named[1] if isinstance(named, tuple) else named


def _assign_groups(members: Sequence[Member], optimizer: Optimizer, comm: Comm) -> None:
    by_id = {id(held): member for member in members for held in (member.param, member.stand_in) if held is not None}
    granularities = granularities_of(optimizer)
    for number, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            member = by_id.get(id(param))
            if member is None:
                raise OptimizerError(
                    f"optimizer.param_groups[{number}] holds a tensor of shape {tuple(param.shape)} that is not a "
                    "parameter of the model"
                )
            if member.group >= 0:
                raise OptimizerError(f"{member.name!r} is in optimizer.param_groups {member.group} and {number}")
            member.group, member.granularity = number, granularities[number]
    left = [member.name for member in members if member.param.requires_grad and member.group < 0]
    if left and comm.rank == 0:
        logger.warning("trainable but in no optimizer group, so they stay as they are: %s", ", ".join(left[:5]))


def _facts(inputs: _Inputs, comm: Comm) -> dict[str, str]:
    """What must be the same on every rank, one line each."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "ranks": str(comm.size)}
    facts |= {f"config.{key}": _plain(value) for key, value in inputs.config.raw.items()}
    for number, member in enumerate(inputs.members):
        kind, trained = _kind(member.param), member.param.requires_grad
        facts[member.name] = f"number {number}, {kind}, group {member.group}, trained {trained}"
    if isinstance(inputs.loader, Loader) and inputs.loader.num_samples is not None:
        facts["samples in training_data"] = str(inputs.loader.num_samples)
    facts |= {f"buffer {name}": _kind(buffer) for name, buffer in inputs.model.named_buffers()}
    if inputs.optimizer is not None:
        facts["optimizer"] = type(inputs.optimizer).__qualname__
        for number, group in enumerate(inputs.optimizer.param_groups):
            options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            facts |= {f"optimizer.param_groups[{number}].{name}": _plain(value) for name, value in options.items()}
    return facts


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _plain(value: Any) -> str:  # any JSON, or whatever an optimizer calls an option
    """One line that is the same in every process; of what is no JSON, the type alone."""

    def other(odd: object) -> object:
        return odd.tolist() if isinstance(odd, torch.Tensor) else type(odd).__qualname__

    return json.dumps(value, sort_keys=True, default=other)


def _assemble(inputs: _Inputs) -> Engine:
    model, config, zero = inputs.model, inputs.config, inputs.config.zero_optimization
    precision = _precision(config)
    comm = default_comm(reproducible=config.reproducible)
    partitioning = zero.partitioning(reproducible=config.reproducible)
    if comm.device.type == "cpu":  # who shards parameters wants memory more than time
        keep_freed_pages(only_small=partitioning.params is SHARD and not zero.rests_sharded)
    activations = config.activation_checkpointing
    checkpointed: list[Forward] = []
    if activations.policy != "none":
        offload = Offload() if activations.cpu_checkpointing else None
        options = Options(selective=activations.policy == "selective", offload=offload)
        checkpointed = checkpoint_blocks(model, options=options, classes=activations.classes, every=activations.every)
    elif activations.cpu_checkpointing:
        configure(checkpoint_in_cpu=True)  # for models that call zerolith.checkpointing.checkpoint themselves
    sharded = ShardedModel(
        model,
        inputs.members,
        Plan(
            partitioning=partitioning,
            precision=precision,
            comm=comm,
            master_device=inputs.placement.master_device,
            copier=inputs.placement.copier,
            offloaded_share=zero.offload_optimizer.ratio,
            residency=weights_in(inputs.placement.weights),
        ),
        WrapPolicy(
            unit_classes=frozenset({*config.zerolith.unit_classes, *zero.leaf_module.classes}),
            unit_names=frozenset(zero.leaf_module.names),
            unit_suffixes=tuple(zero.leaf_module.name_suffixes),
            unit_modules=frozenset(map(id, get_z3_leaf_modules(model))),
            min_numel=zero.stage3_param_persistence_threshold,
            bucket_numel=zero.reduce_bucket_size,
            max_live_numel=zero.max_live_numel,
        ),
        overlap=zero.overlap_comm is not False,
        prefetch=zero.stage3_prefetch_bucket_size > 0,
    )
    handles = [*checkpointed, *([inputs.preemption] if inputs.preemption is not None else [])]
    given = (inputs.optimizer, inputs.watch, handles)
    return Engine(model, config, sharded, _scaler(config, precision), *given, swap=inputs.placement.states)


def _precision(config: Config) -> Precision:
    autocast = config.torch_autocast
    compute = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
    default = torch.get_autocast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return Precision(
        compute=compute,
        reduce=SHORT_DTYPES.get(config.communication_data_type or ""),
        accumulate=SHORT_DTYPES.get(config.data_types.grad_accum_dtype or ""),
        autocast=LONG_DTYPES.get(autocast.dtype or "", default) if autocast.enabled else None,
        predivide=config.gradient_predivide_factor,
    )


def _scaler(config: Config, precision: Precision) -> LossScaler:
    fp16 = config.fp16
    if torch.float16 not in (precision.compute, precision.autocast):
        return LossScaler()
    dynamic = fp16.loss_scale == 0
    return LossScaler(
        scale=2.0**fp16.initial_scale_power if dynamic else fp16.loss_scale,
        dynamic=dynamic,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
        minimum=fp16.min_loss_scale,
    )


def _loader(dataset: Any, config: Config, collate_fn: Callable[[list[Any]], Any] | None, comm: Comm) -> Loader | None:
    if dataset is None:
        return None
    return make_loader(
        dataset,
        micro_batch=config.train_micro_batch_size_per_gpu or 1,
        rank=comm.rank,
        num_ranks=comm.size,
        drop_last=config.dataloader_drop_last,
        num_workers=config.zerolith.dataloader_workers,
        collate_fn=collate_fn,
    )


def _watch(config: Config, comm: Comm, logs: Logs) -> Watch:
    enabled = config.csv_monitor.enabled or config.tensorboard.enabled or config.wandb.enabled
    return Watch(comm, logs, lambda: make_monitors(config), enabled=enabled)


def _scheduler(lr_scheduler: Any, config: Config, optimizer: Optimizer | None, comm: Comm) -> Any:
    named = config.scheduler
    if lr_scheduler is None and named is None:
        return None
    if optimizer is None:
        raise UsageError("initialize: there is a scheduler but no optimizer whose learning rate it could set")
    if lr_scheduler is None and named is not None:
        return build_scheduler(named.type, named.params, optimizer)
    if named is not None and comm.rank == 0:
        logger.warning("a scheduler was passed and config names %r: the passed one is used", named.type)
    made = lr_scheduler if hasattr(lr_scheduler, "step") else lr_scheduler(optimizer)
    if not hasattr(made, "step"):
        raise UsageError(f"initialize: lr_scheduler(...) returned a {type(made).__name__}, which has no step()")
    if getattr(made, "optimizer", optimizer) is not optimizer:
        raise OptimizerError(
            "lr_scheduler drives another optimizer than the one in use, so the learning rate would never change; "
            "build it on the optimizer that you pass to initialize, or pass a function of the optimizer"
        )
    return made


def add_config_arguments(parser: Any) -> Any:  # an argparse.ArgumentParser
    """Add --deepspeed and --deepspeed_config to a parser, as existing scripts expect; returns the parser."""
    group = parser.add_argument_group("zerolith", "training configuration")
    group.add_argument("--deepspeed", action="store_true", help="accepted for compatibility; has no effect")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the JSON config")
    return parser

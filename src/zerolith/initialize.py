"""From a model and a config to an engine, on every rank or on none."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from zerolith.comm import Comm, agree, default_comm, handshake, init_distributed
from zerolith.config import Config, load_config, resolve_batch
from zerolith.data import make_loader
from zerolith.engine import Engine
from zerolith.errors import ConfigError, OptimizerError, UsageError, ZerolithError
from zerolith.memory import keep_freed_pages
from zerolith.optim import build_optimizer, build_scheduler, granularity_of
from zerolith.parameter import ShardedParameter
from zerolith.partitioning import Partitioning
from zerolith.precision import LossScaler, Precision
from zerolith.section import Granularity, Member, Plan
from zerolith.sharded_model import ShardedModel
from zerolith.wrap import WrapPolicy, find_members
from zerolith.zero.init import Origin
from zerolith.zero.marks import get_z3_leaf_modules

logger = logging.getLogger("zerolith")

SHORT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LONG_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What this rank was given, checked; nothing has been sharded yet."""

    config: Config
    optimizer: Optimizer | None
    members: list[Member]
    granularity: Granularity


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
        init_distributed(**({"timeout": timeout} if timeout else {}))
    comm = default_comm()
    if comm.device.type == "cpu":
        keep_freed_pages()
    inputs, error = None, None
    try:
        inputs = _check(args, model, optimizer, model_parameters, _only_one(args, config, config_params), comm)
    except ZerolithError as caught:
        error = caught
    agree(comm, error, doing="zerolith.initialize")
    if inputs is None or model is None:
        raise UsageError("initialize: some rank failed")  # agree has raised already; this is for the type checker
    handshake(comm, _facts(inputs, comm))
    engine = _assemble(model, inputs)
    engine.training_dataloader = make_loader(
        training_data,
        micro_batch=engine.train_micro_batch_size_per_gpu(),
        rank=comm.rank,
        num_ranks=comm.size,
        drop_last=inputs.config.dataloader_drop_last,
        collate_fn=collate_fn,
    )
    engine.lr_scheduler = _scheduler(lr_scheduler, inputs.config, engine)
    if comm.rank == 0:
        logger.info("%s", engine.summary())
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _check(
    args: Any, model: nn.Module | None, optimizer: Any, model_parameters: Any, source: Any, comm: Comm
) -> _Inputs:
    if not isinstance(model, nn.Module):
        raise UsageError(f"initialize: model must be a torch.nn.Module, not {type(model).__name__}")
    config = resolve_batch(load_config(source), comm.size)
    members = find_members(model, _member)
    _move(model, members, comm.device)
    chosen = _optimizer(model, optimizer, model_parameters, config)
    granularity = Granularity.ELEMENT
    if chosen is not None:
        _assign_groups(members, chosen)
        granularity = granularity_of(chosen)
        if any(float(state.get("step", 0)) > 0 for state in chosen.state.values()):
            raise OptimizerError("the optimizer has stepped already; give initialize one without state")
    elif config.zero_optimization.stage in (1, 2):
        raise ConfigError(
            f"zero_optimization.stage: {config.zero_optimization.stage} shards optimizer states, but there is no "
            "optimizer; pass one to initialize or name one under optimizer.type"
        )
    return _Inputs(config=config, optimizer=chosen, members=members, granularity=granularity)


def _member(name: str, param: nn.Parameter) -> Member:
    """A member for a parameter as the model holds it: plain, or sharded under construction by zero.Init."""
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
        # A value, so that every rank fails together inside the agreed part.
        return _Missing(f"initialize: {problem}; pass exactly one of config=, config_params= and --deepspeed_config")
    return given[0]


@dataclass(frozen=True)
class _Missing:
    why: str


def _optimizer(model: nn.Module, optimizer: Any, model_parameters: Any, config: Config) -> Optimizer | None:
    groups = list(model_parameters) if model_parameters is not None else list(model.parameters())
    if optimizer is not None and config.optimizer is not None:
        logger.info(
            "an optimizer was passed and config names %r: the passed one is used", config.optimizer.type
        )
    if isinstance(optimizer, Optimizer):
        return optimizer
    if callable(optimizer):
        made = optimizer(groups)
        if not isinstance(made, Optimizer):
            raise OptimizerError(f"initialize: optimizer(...) returned a {type(made).__name__}, not a torch Optimizer")
        return made
    if optimizer is not None:
        raise OptimizerError(f"initialize: optimizer is a {type(optimizer).__name__}, not a torch Optimizer")
    if config.optimizer is None or not groups:
        return None
    trainable = [group for group in groups if isinstance(group, dict) or group.requires_grad]
    return build_optimizer(config.optimizer.type, config.optimizer.params, trainable)


def _assign_groups(members: Sequence[Member], optimizer: Optimizer) -> None:
    by_id = {id(member.param): member for member in members}
    by_id |= {id(member.stand_in): member for member in members if member.stand_in is not None}
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
            member.group = number
    left = [member.name for member in members if member.param.requires_grad and member.group < 0]
    if left:
        logger.warning("trainable but in no optimizer group, so they stay as they are: %s", ", ".join(left[:5]))


def _facts(inputs: _Inputs, comm: Comm) -> dict[str, str]:
    facts = {"torch": torch.__version__, "python": platform.python_version(), "ranks": str(comm.size)}
    raw = json.loads(json.dumps(inputs.config.raw, default=str, sort_keys=True))
    facts |= {f"config.{key}": json.dumps(value, sort_keys=True) for key, value in raw.items()}
    for member in inputs.members:
        param = member.param
        facts[member.name] = f"{param.dtype} {tuple(param.shape)} group {member.group} trained {param.requires_grad}"
    return facts


def _assemble(model: nn.Module, inputs: _Inputs) -> Engine:
    config, zero = inputs.config, inputs.config.zero_optimization
    precision = _precision(config)
    comm = default_comm(reproducible=config.reproducible)
    partitioning = Partitioning.from_stage(zero.stage, reproducible=config.reproducible)
    leaves = zero.leaf_module
    sharded = ShardedModel(
        model,
        inputs.members,
        Plan(partitioning=partitioning, precision=precision, comm=comm),
        WrapPolicy(
            unit_classes=frozenset({*config.zerolith.unit_classes, *leaves.classes}),
            unit_names=frozenset(leaves.names),
            unit_suffixes=tuple(leaves.name_suffixes),
            unit_modules=frozenset(map(id, get_z3_leaf_modules(model))),
            min_numel=zero.stage3_param_persistence_threshold,
            bucket_numel=zero.reduce_bucket_size,
        ),
        granularity=inputs.granularity,
        overlap=zero.overlap_comm is not False,
        prefetch=zero.stage3_prefetch_bucket_size > 0,
    )
    return Engine(model, config, sharded, precision, _scaler(config), inputs.optimizer)


def _precision(config: Config) -> Precision:
    autocast = config.torch_autocast
    compute = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
    default = torch.get_autocast_dtype("cuda" if torch.cuda.is_available() else "cpu")
    return Precision(
        compute=compute,
        reduce=SHORT_DTYPES.get(config.communication_data_type or ""),
        accumulate=SHORT_DTYPES.get(config.data_types.grad_accum_dtype or ""),
        autocast=LONG_DTYPES.get(autocast.dtype or "", default) if autocast.enabled else None,
    )


def _scaler(config: Config) -> LossScaler:
    fp16 = config.fp16
    autocast_fp16 = config.torch_autocast.enabled and config.torch_autocast.dtype == "float16"
    if not fp16.enabled and not autocast_fp16:
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


def _scheduler(lr_scheduler: Any, config: Config, engine: Engine) -> Any:
    if lr_scheduler is None:
        if config.scheduler is None or engine.basic_optimizer is None:
            return None
        return build_scheduler(config.scheduler.type, config.scheduler.params, engine.basic_optimizer)
    if config.scheduler is not None and engine.global_rank == 0:
        logger.info("a scheduler was passed and config names %r: the passed one is used", config.scheduler.type)
    if not hasattr(lr_scheduler, "step"):
        return lr_scheduler(engine.basic_optimizer)
    driven = getattr(lr_scheduler, "optimizer", None)
    if driven is not None and driven not in (engine.basic_optimizer, engine.optimizer):
        raise OptimizerError(
            "lr_scheduler drives another optimizer than the one in use, so the learning rate would never change; "
            "build it on the optimizer that you pass to initialize, or pass a function of the optimizer"
        )
    return lr_scheduler


def add_config_arguments(parser: Any) -> Any:  # an argparse.ArgumentParser
    """Add --deepspeed and --deepspeed_config to a parser, as existing scripts expect; returns the parser."""
    group = parser.add_argument_group("zerolith", "training configuration")
    group.add_argument("--deepspeed", action="store_true", help="accepted for compatibility; has no effect")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the JSON config")
    return parser

"""What an engine tells about itself: configured values, counters, norms and learning rates. Reads only."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from zerolith.config import Config
from zerolith.micro_steps import MicroSteps
from zerolith.partitioning import SHARD
from zerolith.precision import LossScaler
from zerolith.sharded_model import ShardedModel


class StepReport(NamedTuple):
    """What the last optimizer step did."""

    grad_norm: float  # global 2-norm of the mean gradient before clipping; inf if it overflowed
    skipped: bool  # gradients were not finite on some rank, and no rank stepped
    loss_scale: float  # that the step's backwards used
    culprit: str  # the first parameter whose gradient was not finite


class Status(nn.Module):
    """The questions that clients ask an engine, and what answers them. Only Engine writes to its attributes."""

    def __init__(self, config: Config, sharded: ShardedModel, scaler: LossScaler) -> None:
        super().__init__()
        self.optimizer: Any = None  # a ZeroOptimizer, or None
        self.report: StepReport | None = None  # of the last boundary step
        self._settings = config
        self._sharded = sharded
        self._scaler = scaler
        self._micro = MicroSteps(config.gradient_accumulation_steps or 1, managed=config.managed_gradient_accumulation)
        self._applied = False  # the last step() changed the weights

    def was_step_applied(self) -> bool:
        """Whether the last step() changed the weights: it was at a boundary and not skipped."""
        return self._applied

    def get_global_grad_norm(self) -> float | None:
        """2-norm of the mean gradient before clipping, of the last boundary step; None before the first."""
        return None if self.report is None else self.report.grad_norm

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups] if self.optimizer is not None else []

    def get_mom(self) -> list[Any]:
        """Betas or momentum of each param group."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [group.get("betas", group.get("momentum")) for group in groups]

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch at hand, or the one just done, completes an optimizer step."""
        return self._micro.is_boundary()

    def comms_summary(self) -> str:
        """A table of this rank's collectives by operation and unit; empty unless comms_logger.enabled."""
        log = self._sharded.comm.log
        return log.table() if log is not None else ""

    def train_batch_size(self) -> int:
        return self._settings.train_batch_size or 0

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._settings.train_micro_batch_size_per_gpu or 0

    def gradient_accumulation_steps(self) -> int:
        return self._micro.per_step

    def gradient_clipping(self) -> float:
        return self._settings.gradient_clipping

    def zero_optimization(self) -> bool:
        return self._sharded.plan.partitioning.optim is SHARD

    def zero_optimization_stage(self) -> int:
        return self._settings.zero_optimization.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self._sharded.plan.partitioning.grads is SHARD

    def zero_optimization_partition_weights(self) -> bool:
        return self._sharded.plan.partitioning.params is SHARD

    def fp16_enabled(self) -> bool:
        return self._settings.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        return self._settings.bf16.enabled

    def dynamic_loss_scale(self) -> bool:
        return self._scaler.dynamic

    def loss_scale(self) -> float:
        return self._scaler.scale

    @property
    def micro_steps(self) -> int:
        """Backwards so far."""
        return self._micro.total

    @property
    def device(self) -> torch.device:
        return self._sharded.comm.device

    @property
    def global_rank(self) -> int:
        return self._sharded.comm.rank

    @property
    def local_rank(self) -> int:
        return self.device.index or 0

    @property
    def world_size(self) -> int:
        return self._sharded.comm.size

    dp_world_size = world_size  # data parallelism is the only axis

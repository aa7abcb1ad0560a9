"""DeepSpeed's learning-rate schedules, as torch schedulers.

They work on any torch optimizer, with or without an engine. Each computes the rate of the coming optimizer step from
the number of steps taken, so a state dict of one number is enough. DeepSpeed counts from -1, and its warm-ups repeat
their first value for the first two optimizer steps; so do these.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger("zerolith")
PerGroup = float | Sequence[float]  # one number for all param groups, or one for each
COUNTS = ("last_epoch", "_step_count", "_last_lr")  # of torch's schedulers
MIN_WARMUP = 2  # steps: the logarithm of one step is zero


class _Schedule(LRScheduler):
    """A scheduler whose rates depend on the number of optimizer steps taken alone."""

    def get_lr(self) -> list[float | Tensor]:
        """The rate of the coming optimizer step, for each param group."""
        return [self._rate(group, self.last_epoch) for group in range(len(self.optimizer.param_groups))]

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken. The schedule itself is the config's: a resumed run may have another one."""
        return {name: self.__dict__[name] for name in COUNTS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at that step; the optimizer's rate follows with the next one."""
        self.__dict__.update({name: state_dict[name] for name in COUNTS if name in state_dict})

    @abstractmethod
    def _rate(self, group: int, step: int) -> float:
        """What `group`'s rate is for optimizer step `step`, counted from 0."""

    def _per_group(self, name: str, value: PerGroup) -> list[float]:
        count = len(self.optimizer.param_groups)
        values = list(value) if isinstance(value, Sequence) else [value] * count
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} numbers for {count} param groups")
        return values


class LRRangeTest(_Schedule):
    """A rate that grows steadily, to find the largest one that trains (Smith, arXiv:1506.01186).

    lr = min_lr * (1 + step_rate * step / step_size); with `staircase`, step / step_size is rounded down.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self.optimizer = optimizer
        self.min_lrs = self._per_group("lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _positive("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_epoch)

    def _rate(self, group: int, step: int) -> float:
        intervals = step / self.step_size
        return self.min_lrs[group] * (1 + self.step_rate * (math.floor(intervals) if self.staircase else intervals))


class OneCycle(_Schedule):
    """One rise and fall of the rate, then a decay; momentum (beta1) does the opposite (Smith, arXiv:1803.09820).

    Unlike DeepSpeed's, beta2 is left alone, and the first step has the momentum of the formula, the largest.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.optimizer = optimizer
        self.min_lrs = self._per_group("cycle_min_lr", cycle_min_lr)
        self.max_lrs = self._per_group("cycle_max_lr", cycle_max_lr)
        self.rise = _positive("cycle_first_step_size", cycle_first_step_size)
        self.fall = self.rise
        if cycle_second_step_size is not None:
            self.fall = _positive("cycle_second_step_size", cycle_second_step_size)
        self.decay_lr_rate, self.decay_mom_rate, self.decay_step_size = decay_lr_rate, decay_mom_rate, decay_step_size
        self.min_mom, self.max_mom = cycle_min_mom, cycle_max_mom
        self.cycle_momentum = cycle_momentum and all("betas" in group for group in optimizer.param_groups)
        if cycle_momentum and not self.cycle_momentum:
            logger.warning("OneCycle: %s has no betas, so its momentum stays as it is", type(optimizer).__name__)
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Set the rate and the momentum of the coming optimizer step."""
        super().step(epoch)
        if self.cycle_momentum:
            for group in self.optimizer.param_groups:
                group["betas"] = (self._momentum(self.last_epoch), *group["betas"][1:])

    def _rate(self, group: int, step: int) -> float:
        low, high = self.min_lrs[group], self.max_lrs[group]
        if step > self.rise + self.fall:
            return low / (1 + self.decay_lr_rate * self._intervals(step))
        return low + (high - low) * self._height(step)

    def _momentum(self, step: int) -> float:
        if step > self.rise + self.fall:
            return self.max_mom * (1 + self.decay_mom_rate * self._intervals(step))
        return self.max_mom - (self.max_mom - self.min_mom) * self._height(step)

    def _height(self, step: int) -> float:
        """0 at both ends of the cycle, 1 at its peak."""
        return step / self.rise if step <= self.rise else 1 - (step - self.rise) / self.fall

    def _intervals(self, step: int) -> float:
        return (step - self.rise - self.fall) / self.decay_step_size if self.decay_step_size else 0.0


class WarmupLR(_Schedule):
    """From `warmup_min_lr` to `warmup_max_lr` (the group's own rate if None), then constant.

    `warmup_type`: "log" rises as ln(step) / ln(warmup_num_steps), "linear" as a line.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_epoch: int = -1,
    ) -> None:
        self.optimizer = optimizer
        own = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self._per_group("warmup_max_lr", own if warmup_max_lr is None else warmup_max_lr)
        self.warmup_num_steps = max(MIN_WARMUP, warmup_num_steps)
        self.warmup_type = _known_warmup(warmup_type)
        super().__init__(optimizer, last_epoch)

    def _rate(self, group: int, step: int) -> float:
        low, high = self.min_lrs[group], self.max_lrs[group]
        done = step - 1
        if done >= self.warmup_num_steps:
            return self._after(low, high, done)
        return low + (high - low) * _warmed(done, self.warmup_num_steps, self.warmup_type)

    def _after(self, low: float, high: float, done: int) -> float:
        return high


class WarmupDecayLR(WarmupLR):
    """WarmupLR, then a line down to `warmup_min_lr` at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_epoch: int = -1,
    ) -> None:
        self.total_num_steps = _enough(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_epoch)

    def _after(self, low: float, high: float, done: int) -> float:
        left = (self.total_num_steps - done) / max(1, self.total_num_steps - self.warmup_num_steps)
        return low + (high - low) * max(0.0, left)


class WarmupCosineLR(_Schedule):
    """From `warmup_min_ratio` of the group's rate to all of it, then half a cosine down to `cos_min_ratio` of it.

    The very first optimizer step has rate 0, as in DeepSpeed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 1e-4,
        warmup_type: str = "log",
        last_epoch: int = -1,
    ) -> None:
        self.optimizer = optimizer
        self.total_num_steps = _enough(total_num_steps, warmup_num_steps)
        self.warmup_num_steps = max(MIN_WARMUP, warmup_num_steps)
        self.warmup_min_ratio, self.cos_min_ratio = warmup_min_ratio, cos_min_ratio
        self.warmup_type = _known_warmup(warmup_type)
        super().__init__(optimizer, last_epoch)

    def _rate(self, group: int, step: int) -> float:
        return float(self.base_lrs[group]) * self._ratio(step - 1)

    def _ratio(self, done: int) -> float:
        warmup, total = self.warmup_num_steps, self.total_num_steps
        if done < 0:
            return 0.0
        if done < warmup:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * _warmed(done, warmup, self.warmup_type)
        passed = min(1.0, (done - warmup + 1) / max(1, total - warmup))
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * (1 + math.cos(math.pi * passed)) / 2


def _warmed(done: int, warmup: int, kind: str) -> float:
    """How far warm-up is after `done` steps, 0 to 1; 0 before the first."""
    if done < 0:
        return 0.0
    return math.log(done + 1) / math.log(warmup) if kind == "log" else done / warmup


def _known_warmup(kind: str) -> str:
    if kind not in ("log", "linear"):
        raise ValueError(f"warmup_type is {kind!r}; it must be 'log' or 'linear'")
    return kind


def _positive(name: str, value: int) -> int:
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be larger than 0")
    return value


def _enough(total: int, warmup: int) -> int:
    if _positive("total_num_steps", total) < warmup:
        logger.warning("total_num_steps %d is less than warmup_num_steps %d: warm-up never ends", total, warmup)
    return total


SCHEDULES: dict[str, type[LRScheduler]] = {
    schedule.__name__: schedule for schedule in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}

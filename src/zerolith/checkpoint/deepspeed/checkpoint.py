"""What a checkpoint of DeepSpeed holds, whatever its stage: the same for each, and nothing of how it was split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zerolith.checkpoint.deepspeed.archive import open_archive

Load = Callable[[], Tensor]  # reads the files anew; raises CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignParameter:
    """One parameter, whole. Its tensors are read from the files when they are asked for, each time anew."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # that the model computed in; None if the files do not say
    trained: bool  # it is the optimizer's
    value: Load  # the fp32 master if there is one, else the weights as they were stored
    state: Mapping[str, Load] = field(default_factory=dict)  # the optimizer's, in the shape of the parameter
    scalars: Mapping[str, float] = field(default_factory=dict)  # the optimizer's, such as {"step": 10.0}


class ParamGroup(NamedTuple):
    """One of the optimizer's param groups."""

    options: dict[str, Any]  # JSON
    names: tuple[str, ...] | None  # None: the files do not say


@dataclass(frozen=True, kw_only=True)
class DeepSpeedCheckpoint:
    """One checkpoint that DeepSpeed wrote."""

    home: Path
    files: tuple[Path, ...]  # that have been opened
    step: int  # of the optimizer, skipped ones included
    samples: int
    skipped_steps: int
    zero_stage: int
    num_ranks: int
    parameters: dict[str, ForeignParameter]  # in the order of the model
    buffers: dict[str, Tensor]
    aliases: dict[str, str]  # another name of a parameter -> its name in `parameters`
    param_groups: list[ParamGroup]
    scheduler: Any  # JSON; None: there was none
    loss_scale: float | None
    client_state: dict[Any, Any]  # what the client gave to save_checkpoint; objects of classes as Unknown

    def verify(self) -> None:
        """Read every byte of every file and compare checksums. Raises CheckpointDamagedError."""
        for path in self.files:
            open_archive(path).verify()

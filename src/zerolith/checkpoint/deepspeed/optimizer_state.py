"""A torch optimizer's state_dict as it lies in DeepSpeed's files, and what those say beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zerolith.checkpoint.deepspeed.checkpoint import ForeignParameter, ParamGroup
from zerolith.checkpoint.deepspeed.model_state import item
from zerolith.checkpoint.deepspeed.plain import as_json, number
from zerolith.checkpoint.deepspeed.records import StoredTensor, Unknown, brief
from zerolith.errors import CheckpointDamagedError

HIDDEN = ("params", "param_names")  # of a param group: numbers and names, no options


class Restored(NamedTuple):
    """What one kind of checkpoint gives."""

    parameters: dict[str, ForeignParameter]
    param_groups: list[ParamGroup]
    zero_stage: int
    loss_scale: float | None
    files: tuple[Path, ...]  # beside the model_states files


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """States by the numbers that param groups give to their tensors."""

    states: dict[int, dict[str, Any]]
    groups: list[dict[str, Any]]  # with "params": the numbers

    @property
    def numbers(self) -> list[list[int]]:
        return [group["params"] for group in self.groups]

    def tensors(self, index: int) -> dict[str, StoredTensor]:
        """The states of one tensor that have dimensions."""
        state = self.states.get(index, {})
        return {key: each for key, each in state.items() if isinstance(each, StoredTensor) and each.shape}

    def scalars(self, index: int) -> dict[str, float]:
        """The other states of one tensor that are numbers; the step of its group if it has none of its own."""
        found = {key: value for key, each in self.states.get(index, {}).items() if (value := number(each)) is not None}
        group = next((group for group in self.groups if index in group["params"]), {})
        step = number(group.get("step"))
        return found if "step" in found or step is None or index not in self.states else {**found, "step": step}

    def param_groups(self, names: list[tuple[str, ...]] | None) -> list[ParamGroup]:
        """The groups' options, and the names of each group's parameters as they are known."""
        options = [{key: as_json(each) for key, each in group.items() if key not in HIDDEN} for group in self.groups]
        return [ParamGroup(each, names[index] if names is not None else None) for index, each in enumerate(options)]


def optimizer_state(content: Any, *, where: Path, step: Any = None) -> OptimizerState:
    """Read a state_dict; or a list of states, one a group, as DeepSpeed's elastic checkpoints have. `step` is theirs.

    Raises CheckpointDamagedError.
    """
    if isinstance(content, list):
        content = {
            "state": dict(enumerate(content)),
            "param_groups": [{"params": [index], "step": step} for index in range(len(content))],
        }
    states = item(content, "state", dict, where=where)
    groups = item(content, "param_groups", list, where=where)
    for number_, state in states.items():
        if type(number_) is not int or not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise CheckpointDamagedError(f"{where}: the optimizer's state has an entry {brief(number_)}")
    for group in groups:
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or not all(type(each) is int for each in numbers):
            raise CheckpointDamagedError(f"{where}: a param group of the optimizer does not say which tensors it has")
    return OptimizerState(states=states, groups=groups)


def loss_scale(content: Mapping[Any, Any]) -> float | None:
    """The loss scale that an optimizer of DeepSpeed has saved."""
    scaler = content.get("loss_scaler")
    if isinstance(scaler, Unknown) and isinstance(scaler.state, dict):
        return number(scaler.state.get("cur_scale"))
    return number(content.get("cur_scale"))

"""One parameter of the model, and what its optimizer needs to see of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor, nn

from zerolith.parameter import ShardedParameter


class Granularity(Enum):
    """What an optimizer needs to see of a tensor in order to step it."""

    ELEMENT = "element"  # any part of it: Adam, SGD, Lion, ...
    TENSOR = "tensor"  # the whole of it: Muon, Adafactor, Shampoo, ...


@dataclass(eq=False, kw_only=True)
class Member:
    """One parameter of the model and every place where modules hold it."""

    name: str
    param: nn.Parameter
    homes: list[tuple[nn.Module, str]] = field(default_factory=list)
    group: int = -1  # index of its optimizer param group; -1 if no optimizer has it
    granularity: Granularity = Granularity.ELEMENT  # what that group's optimizer needs to see of it
    whole: Callable[[], Tensor] | None = None  # for parameters that are sharded already: collective, the whole tensor
    stand_in: ShardedParameter | None = None  # what the model held instead of `param`, where it was sharded before
    wanted_grad: bool = True  # requires_grad when the engine was made

    def __post_init__(self) -> None:
        self.wanted_grad = self.param.requires_grad

    @property
    def trained(self) -> bool:
        return self.group >= 0

    def install(self, param: Tensor, *, instead_of: Tensor | None = None) -> None:
        """Make every module that holds this parameter hold `param` in its place.

        `instead_of`: only modules that hold that one; torch.func.functional_call may have lent them another.
        """
        for module, attribute in self.homes:
            # Not setattr: modules such as nn.LSTM keep lists of their parameters and rebuild them on assignment.
            if instead_of is None or module._parameters.get(attribute) is instead_of:
                module._parameters[attribute] = param  # type: ignore[assignment]  # a stand-in counts as a parameter

    def is_held(self, stand_in: Tensor | None) -> bool:
        """Whether all those modules hold it, or `stand_in`."""
        for module, attribute in self.homes:
            held = module._parameters.get(attribute)
            if held is not self.param and (held is None or held is not stand_in):
                return False
        return True

"""What a section of the config is made of: its base class, and the kinds of values that its keys have."""

import math
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

T = TypeVar("T")
MAX_INT = 2**63 - 1


def _integral(value: object) -> object:
    """JSON has no integer exponents: 5e8 arrives as a float and means 500000000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _infinite_is_never(value: object) -> object:
    return None if isinstance(value, float) and value == math.inf else value


def key(default: T, meaning: str, **bounds: int) -> T:
    """A field with its default, documentation and bounds."""
    return Field(default, description=meaning, **bounds)  # type: ignore[call-overload]  # `bounds` are ge, gt, le


Count = Annotated[int, Field(gt=0, le=MAX_INT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_INT)]
Elements = Annotated[CountOrZero, BeforeValidator(_integral)]
SomeElements = Annotated[Count, BeforeValidator(_integral)]
Share = Annotated[float, Field(ge=0, le=1)]
Stage = Annotated[int, Field(ge=0, le=3)]  # a Literal would take True for 1
StepsOrNever = Annotated[Count | None, BeforeValidator(_infinite_is_never)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # JSON has lists where we keep tuples
Name = Annotated[str, Field(min_length=1)]
ShortDtype = Literal["fp16", "bf16", "fp32"]


class Section(BaseModel):
    """A JSON object with known keys only; bools are not ints and 8.0 is not 8."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

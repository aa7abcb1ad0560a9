"""Wrong arguments end in an error that names them, before anything is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zerolith import kernels
from zerolith.errors import UsageError


def array(numel: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(numel, dtype=dtype)


def adamw(**changes: object) -> None:
    given = {"master": array(), "exp_avg": array(), "exp_avg_sq": array(), "grad": array()}
    numbers = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    kernels.adamw(**{**given, **numbers, **changes})


def released() -> Tensor:
    tensor = array()
    tensor.untyped_storage().resize_(0)
    return tensor


def overlapping() -> dict[str, Tensor]:
    both = array(12)
    return {"exp_avg": both[:8], "exp_avg_sq": both[4:]}


class Special(Tensor):
    pass


def split_with_out() -> None:
    adamw(master=kernels.split(array()), out=array())


WRONG: dict[str, Callable[[], object]] = {
    r"grad is float64; it must be float32 or bfloat16 or float16": lambda: adamw(grad=array(dtype=torch.float64)),
    r"master is bfloat16; it must be float32": lambda: adamw(master=array(dtype=torch.bfloat16)),
    r"exp_avg is float16; it must be float32": lambda: adamw(exp_avg=array(dtype=torch.float16)),
    r"out is int16": lambda: adamw(out=array(dtype=torch.int16)),
    r"exp_avg_sq has 9 elements, master has 8": lambda: adamw(exp_avg_sq=array(9)),
    r"out has 7 elements": lambda: adamw(out=array(7)),
    r"grad is not contiguous": lambda: adamw(grad=array(16)[::2]),
    r"exp_avg is not contiguous": lambda: adamw(exp_avg=torch.zeros(8).to_sparse()),
    r"grad is on meta, master on cpu": lambda: adamw(grad=torch.zeros(8, device="meta")),
    r"grad has no memory: its storage was released": lambda: adamw(grad=released()),
    r"exp_avg and exp_avg_sq overlap": lambda: adamw(**overlapping()),
    r"exp_avg is NoneType, not a tensor": lambda: adamw(exp_avg=None),
    r"grad is Special; pass a plain tensor": lambda: adamw(grad=array().as_subclass(Special)),
    r"a split master is its own bf16 weights": split_with_out,
    r"master.remainder is int32": lambda: adamw(
        master=kernels.SplitMaster(array(dtype=torch.bfloat16), array(dtype=torch.int32))
    ),
    r"step 0: steps count from 1": lambda: adamw(step=0),
    r"betas \(0.9, 1.0\) must lie in": lambda: adamw(betas=(0.9, 1.0)),
    r"lr -1.0 must not be negative": lambda: adamw(lr=-1.0),
    r"eps nan must not be negative": lambda: adamw(eps=float("nan")),
    r"threads 0": lambda: adamw(threads=0),
    r"momentum_buffer: needed with a momentum": lambda: kernels.sgd(array(), None, array(), lr=1, step=1, momentum=0.9),
    r"momentum_buffer: .* momentum is 0.0": lambda: kernels.sgd(array(), array(), array(), lr=1, step=1),
    r"nesterov needs a momentum": lambda: kernels.sgd(array(), None, array(), lr=1, step=1, nesterov=True),
    r"values is int64": lambda: kernels.square_sums(torch.zeros(3, dtype=torch.int64)),
    r"blocks has 2 elements on cpu; 1 on cpu are needed": lambda: kernels.add(
        array(), [array()], blocks=array(2, torch.float64)
    ),
    r"blocks is float32; it must be float64": lambda: kernels.add(array(), [array()], blocks=array(1)),
    r"target is bfloat16": lambda: kernels.add(array(dtype=torch.bfloat16), [array()]),
    r"terms\[1\] is bfloat16; it must be float32": lambda: kernels.add(array(), [array(), array(dtype=torch.bfloat16)]),
    r"terms: there is none": lambda: kernels.add(array(), []),
    r"master is float64": lambda: kernels.split(array(dtype=torch.float64)),
    r"weight is float16": lambda: kernels.join(
        kernels.SplitMaster(array(dtype=torch.float16), array(dtype=torch.int16))
    ),
    r"out has 9 elements": lambda: kernels.join(kernels.split(array()), out=array(9)),
}


@pytest.mark.parametrize(("message", "call"), WRONG.items(), ids=WRONG)
def test_a_wrong_argument_is_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_neighbours_and_shapes_are_no_mistake() -> None:
    both = array(16)
    adamw(exp_avg=both[:8], exp_avg_sq=both[8:], grad=array().view(2, 4))
    adamw(master=array(0), exp_avg=array(0), exp_avg_sq=array(0), grad=array(0), out=array(0))
    kernels.lion(array(), array(), array(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    kernels.adagrad(array(), array(), array(), lr=1e-3, step=1)


@pytest.mark.parametrize("make", [torch.inference_mode, torch.no_grad])
def test_parameters_and_inference_tensors_are_taken(make: Callable[[], object]) -> None:
    with make():
        kernels.sgd(torch.nn.Parameter(array()), None, array(), lr=0.1, step=1, out=array(dtype=torch.bfloat16))

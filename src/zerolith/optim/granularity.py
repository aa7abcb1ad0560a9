"""What an optimizer needs to see of a tensor: known for torch.optim, asked of the user, or found out by trying."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.errors import OptimizerError
from zerolith.section import Granularity

ELEMENTWISE = "Adadelta Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD".split()
WHOLE = "Adafactor Muon".split()
REFUSED = {
    "LBFGS": "it calls the model again within one step (a closure) and mixes all parameters; train with another",
    "SparseAdam": "gradients are dense here; use Adam",
}


def granularity_of(optimizer: Optimizer) -> Granularity:
    """ELEMENT or TENSOR.

    A class outside torch.optim may say so itself by an attribute `granularity = "tensor"` (or "element");
    otherwise three steps on small tensors show it. Does not communicate. Raises OptimizerError if the optimizer
    mixes different parameters, which no sharding can reproduce.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim"):
        if kind.__name__ in REFUSED:
            raise OptimizerError(f"torch.optim.{kind.__name__} cannot be used: {REFUSED[kind.__name__]}")
        if kind.__name__ in ELEMENTWISE + WHOLE:
            return Granularity.TENSOR if kind.__name__ in WHOLE else Granularity.ELEMENT
    said = getattr(optimizer, "granularity", None)
    if said is not None:
        return Granularity(said)
    return _try_out(optimizer)


def _try_out(optimizer: Optimizer) -> Granularity:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator) for shape in ((4, 6), (6, 4)))
    together = _train(optimizer, [first, second])
    if together is None:
        return Granularity.TENSOR  # it refuses even plain matrices; its owner rank will show its own message
    alone = _train(optimizer, [first])
    if alone is None or not torch.equal(alone[0], together[0]):
        raise OptimizerError(
            f"{type(optimizer).__name__} steps a parameter differently when others are there, so ranks that hold "
            "different shards would drift apart. Give its class the attribute granularity = 'tensor' if you know better."
        )
    halves = _train(optimizer, [*first.view(-1).split(12), second])
    same = halves is not None and torch.allclose(torch.cat(halves[:2]), together[0].view(-1), rtol=1e-5, atol=1e-7)
    return Granularity.ELEMENT if same else Granularity.TENSOR


def _train(optimizer: Optimizer, tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors after three steps of a copy of `optimizer`; None if it does not take them."""
    params = [nn.Parameter(tensor.clone()) for tensor in tensors]
    clone = copy.copy(optimizer)
    clone.state = defaultdict(dict)
    clone.param_groups = [{**optimizer.param_groups[0], "params": params}]
    try:
        for step in range(1, 4):
            for param in params:
                param.grad = torch.sin(param.detach() * step)
            # Not the instance's attribute: an LR scheduler may have wrapped it to count steps.
            type(clone).step(clone)
    except Exception:  # whatever a third-party optimizer raises means the same: it does not take these
        return None
    return [param.detach() for param in params]

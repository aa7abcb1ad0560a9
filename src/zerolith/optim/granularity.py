"""What an optimizer needs to see of a tensor: known for torch.optim, asked of the user, or found out by trying."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.errors import OptimizerError
from zerolith.member import Granularity

ELEMENTWISE = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
WHOLE = ["Adafactor", "Muon"]
REFUSED = {
    "LBFGS": "it calls the model again within one step (a closure) and mixes all parameters; train with another",
    "SparseAdam": "gradients are dense here; use Adam",
}
TRIAL_LR = 0.1  # large enough that no step is lost in rounding; the client's may be 0 while it warms up


def granularities_of(optimizer: Optimizer) -> list[Granularity]:
    """ELEMENT or TENSOR, for each param group.

    A class outside torch.optim may say so itself by an attribute `granularity = "tensor"` (or "element"), or by a
    function of that name of a param group; otherwise a few steps on small tensors, with the options of the group,
    show it. Does not communicate. Raises OptimizerError if the optimizer mixes different parameters, which no
    sharding can reproduce.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim"):
        if kind.__name__ in REFUSED:
            raise OptimizerError(f"torch.optim.{kind.__name__} cannot be used: {REFUSED[kind.__name__]}")
        if kind.__name__ in ELEMENTWISE + WHOLE:
            known = Granularity.TENSOR if kind.__name__ in WHOLE else Granularity.ELEMENT
            return [known] * len(optimizer.param_groups)
    said = getattr(optimizer, "granularity", None)
    if said is not None:
        return [_said(kind, said(group) if callable(said) else said) for group in optimizer.param_groups]
    tried: dict[str, Granularity] = {}  # by the group's options, among which learning rates do not count
    found = []
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        lr = options.get("lr")
        if lr is not None:
            options["lr"] = torch.full_like(lr, TRIAL_LR) if isinstance(lr, Tensor) else TRIAL_LR
        key = repr({**options, "initial_lr": None, "lr": None})
        if key not in tried:
            tried[key] = _try_out(optimizer, options)
        found.append(tried[key])
    return found


def _said(kind: type, said: object) -> Granularity:
    try:
        return Granularity(said)
    except ValueError:
        raise OptimizerError(f"{kind.__name__}.granularity is {said!r}; it must be 'element' or 'tensor'") from None


def _try_out(optimizer: Optimizer, options: Mapping[str, Any]) -> Granularity:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator) for shape in ((4, 6), (6, 4)))
    together = _train(optimizer, options, [first, second])
    if together is None:
        return Granularity.TENSOR  # it refuses even plain matrices; its owner rank will show its own message
    alone = _train(optimizer, options, [first])
    if alone is None or not torch.equal(alone[0], together[0]):
        raise OptimizerError(
            f"{type(optimizer).__name__} steps a parameter differently when others are there, so ranks that hold "
            "different shards would drift apart; give its class the attribute granularity = 'tensor' if you know better"
        )
    halves = _train(optimizer, options, [*first.view(-1).split(12), second])
    same = halves is not None and torch.allclose(torch.cat(halves[:2]), together[0].view(-1), rtol=1e-5, atol=1e-7)
    return Granularity.ELEMENT if same else Granularity.TENSOR


def _train(optimizer: Optimizer, options: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors after three steps of a copy of `optimizer`; None if it does not take them."""
    params = [nn.Parameter(tensor.clone()) for tensor in tensors]
    clone = _clone(optimizer)
    clone.param_groups = [{**options, "params": params}]
    try:
        for step in range(1, 4):
            for param in params:
                param.grad = torch.sin(param.detach() * step)
            # Not the instance's attribute: an LR scheduler may have wrapped it to count steps.
            type(clone).step(clone)
    except Exception:  # whatever a third-party optimizer raises means the same: it does not take these
        return None
    return [param.detach() for param in params]


def _clone(optimizer: Optimizer) -> Optimizer:
    """A copy with all attributes, those that torch's own copying leaves out too, but without state and hooks."""
    clone: Optimizer = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        own = copy.copy(value) if isinstance(value, (dict, list, set)) else value
        clone.__dict__[name] = OrderedDict() if name.endswith("_hooks") else own
    clone.state = defaultdict(dict)
    return clone

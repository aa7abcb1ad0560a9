"""Whole and local views of masters, gradients and optimizer states, by parameter.

The `full` forms are for all ranks together, and the same parameter: getters give every rank the whole tensor, setters
take it from every rank. The `local` forms see this rank's flat part only. Gradients can
be asked for between the last micro-batch's backward and step().
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zerolith.comm import agree
from zerolith.errors import UsageError
from zerolith.gradients import Gradients
from zerolith.layout import Range
from zerolith.partitioning import SHARD
from zerolith.zero.owners import Owner, owner_of

Part = tuple[Tensor, Range]  # a flat view, and where it lies in the flattened parameter


def safe_get_full_fp32_param(param: Tensor) -> Tensor | None:
    """The master weights, in the parameter's shape and the master dtype; None if the parameter is not trained."""
    owner = _owner(param)
    with owner.resident():
        return None if owner.gradients is None else _whole(owner, _stepped_parts(owner))


def safe_get_full_grad(param: Tensor) -> Tensor | None:
    """The mean gradient over ranks and micro-batches; None if none has been reduced since the last step."""
    owner = _owner(param)
    if not _finish_late(owner):
        return None
    return _whole(owner, _grad_parts(owner), flat_shards=True).div_(owner.terms())


def safe_get_full_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """The optimizer's state `optim_state_key` (exp_avg, momentum_buffer, ...), in the parameter's shape.

    Raises UsageError, on every rank, if the optimizer has none of that name, or not yet.
    """
    owner = _owner(param)
    if owner.gradients is None:
        return None
    with owner.resident():
        return _whole(owner, _state_parts(owner, optim_state_key))


def safe_set_full_fp32_param(param: Tensor, value: Tensor) -> None:
    """Overwrite the master weights and the weights. `value`: the whole tensor, the same on every rank."""
    owner = _owner(param)
    flat = _checked(param, value)
    with owner.resident():  # around both, as in Section.adopt_slot
        _write(_stepped_parts(owner), flat)
        owner.place.section.write_slot(owner.place.index, flat)


def safe_set_full_grad(param: Tensor, value: Tensor) -> None:
    """Overwrite the mean gradient that the next step will use. `value`: the same on every rank. Collective."""
    owner = _owner(param)
    _finish_late(owner)
    _write(_grad_to_set(owner), _summed(owner, _checked(param, value)))


def safe_set_full_optimizer_state(param: Tensor, value: Tensor, optim_state_key: str) -> None:
    """Overwrite an optimizer state. `value`: the whole tensor, the same on every rank. Collective.

    Raises UsageError, on every rank, if the optimizer has none of that name, or not yet.
    """
    owner = _owner(param)
    flat = _checked(param, value)
    with owner.resident():
        _write(_state_parts(owner, optim_state_key), flat)


def safe_get_local_fp32_param(param: Tensor) -> Tensor | None:
    """This rank's flat part of the master weights; empty if it has none."""
    owner = _owner(param)
    with owner.resident():
        return None if owner.gradients is None else _local(_stepped_parts(owner), param)


def safe_get_local_grad(param: Tensor) -> Tensor | None:
    """This rank's flat part of the mean gradient."""
    owner = _owner(param)
    if not _has_mean(owner.gradients):
        return None
    return _local(_grad_parts(owner), param).to(param.device) / owner.terms()


def safe_get_local_optimizer_state(param: Tensor, optim_state_key: str) -> Tensor | None:
    """This rank's flat part of an optimizer state."""
    owner = _owner(param)
    with owner.resident():
        return None if owner.gradients is None else _local(_stepped_parts(owner, optim_state_key), param)


def safe_set_local_fp32_param(param: Tensor, value: Tensor) -> None:
    """Overwrite this rank's flat part of the master weights; whole weights follow at the next step."""
    owner = _owner(param)
    section = owner.place.section
    with owner.resident():
        _write_local(_stepped_parts(owner), value)
        if section.is_sharded and section.main is not None:
            section.write_part(owner.place.index, value.detach().reshape(-1))


def safe_set_local_grad(param: Tensor, value: Tensor) -> None:
    """Overwrite this rank's flat part of the mean gradient."""
    owner = _owner(param)
    _write_local(_grad_to_set(owner), _summed(owner, value))


def safe_set_local_optimizer_state(param: Tensor, value: Tensor, optim_state_key: str) -> None:
    """Overwrite this rank's flat part of an optimizer state."""
    owner = _owner(param)
    with owner.resident():
        _write_local(_stepped_parts(owner, optim_state_key), value)


def _owner(param: Tensor) -> Owner:
    owner = owner_of(param)
    if owner is None:
        raise UsageError("this parameter belongs to no engine; pass one of the model given to zerolith.initialize")
    return owner


def _trained(owner: Owner) -> Gradients:
    if owner.gradients is None:
        raise UsageError(f"{owner.place.member.name!r} is not trained, so it has no gradient")
    return owner.gradients


def _finish_late(owner: Owner) -> bool:
    """Whether all gradients since the last step are reduced, also what came late on some rank. Collective then."""
    is_due = owner.gradients is not None and not owner.gradients.fresh and not owner.sharded.reducer.partial
    if is_due:
        owner.sharded.reducer.finish_late()
    return is_due


def _has_mean(own: Gradients | None) -> bool:
    """Whether a gradient has been reduced since the last step and none has come after it."""
    return own is not None and not own.fresh and own.term is None


def _summed(owner: Owner, mean: Tensor) -> Tensor:
    """The sum over ranks and micro-batches, loss scale included, that has this mean. 16 bits may be too few for it."""
    return mean.to(torch.promote_types(mean.dtype, torch.float32)) * owner.terms()


def _checked(param: Tensor, value: Tensor) -> Tensor:
    if value.shape != param.shape:
        raise UsageError(
            f"a value of shape {tuple(value.shape)} does not fit a parameter of shape {tuple(param.shape)}"
        )
    return value.detach().reshape(-1)


def _stepped_parts(owner: Owner, key: str | None = None) -> list[Part]:
    """What the optimizer has on this rank: of the master, or of its state `key`."""
    if owner.optimizer is None:
        return []
    parts, states = [], owner.optimizer.inner.state
    for tensor, inside, part in owner.optimizer.locate(_trained(owner), owner.place.index):
        value = tensor.detach() if key is None else _state(owner, states.get(tensor, {}), key, tensor.shape)
        parts.append((value.view(-1)[inside.start : inside.stop], part))
    return parts


def _state_parts(owner: Owner, key: str) -> list[Part]:
    """What this rank has of the state `key`. Collective: if one rank has a part and no such state, all raise."""
    parts: list[Part] = []
    error: UsageError | None = None
    try:
        parts = _stepped_parts(owner, key)
    except UsageError as caught:
        error = caught
    agree(owner.sharded.comm, error, doing=f"looking for the optimizer state {key!r}", kind=UsageError)
    return parts


def _state(owner: Owner, state: Mapping[str, object], key: str, shape: torch.Size) -> Tensor:
    if key not in state:
        known = ", ".join(state) or "none before the first step"
        raise UsageError(f"{owner.place.member.name!r} has no optimizer state {key!r}; it has: {known}")
    value = state[key]
    if not isinstance(value, Tensor) or value.shape != shape:
        raise UsageError(f"optimizer state {key!r} is not one number per element; read it from optimizer.state")
    return value


def _grad_parts(owner: Owner) -> list[Part]:
    """All that is right on this rank before the step: the shard, or the whole where it is gathered already."""
    own = _trained(owner)
    owner.sharded.reducer.wait_for_gathers()
    slot = own.section.layout.slots[owner.place.index]
    held = own.sum if own.gathered else own.sum.own()
    part = slot.span.clip(held.range)
    return [(held.at(part), part.shift(-slot.start))] if part.numel else []


def _grad_to_set(owner: Owner) -> list[Part]:
    own, place = _trained(owner), owner.place
    if not _has_mean(own):
        raise UsageError(
            f"the gradient of {place.member.name!r} would be lost: set it between the backward that completes it and "
            "step()"
        )
    own.used[place.index] = True  # a step uses it even if backward gave it none
    own.edited()
    return _grad_parts(owner)


def _whole(owner: Owner, parts: list[Part], *, flat_shards: bool = False) -> Tensor:
    """Put the ranks' parts together. Collective where states are sharded."""
    section, index, name = owner.place.section, owner.place.index, owner.place.member.name
    comm, slot = section.plan.comm, section.layout.slots[index]
    dtype = parts[0][0].dtype if parts else _trained(owner).sum.data.dtype
    whole = torch.zeros(slot.numel, dtype=dtype, device=comm.device)
    for tensor, part in parts:
        whole[part.start : part.stop].copy_(tensor)
    if section.main is None and not flat_shards:  # its owner has the whole tensor
        comm.broadcast(whole, source=section.owners[index], name=name)
    elif flat_shards or section.plan.partitioning.optim is SHARD:
        for rank in range(comm.size):
            part = section.layout.owned(index, rank)
            comm.broadcast(whole[part.start : part.stop], source=rank, name=name)
    return whole.view(slot.shape)


def _write(parts: list[Part], flat: Tensor) -> None:
    for tensor, part in parts:
        tensor.copy_(flat[part.start : part.stop])


def _local(parts: list[Part], param: Tensor) -> Tensor:
    nothing = torch.empty(0, dtype=torch.float32, device=param.device)
    return torch.cat([tensor for tensor, _ in parts]) if parts else nothing


def _write_local(parts: list[Part], value: Tensor) -> None:
    held = [part.numel for _, part in parts]
    if value.numel() != sum(held):
        raise UsageError(
            f"this rank holds {sum(held)} elements of the parameter; a value of {value.numel()} does not fit"
        )
    for (tensor, _), piece in zip(parts, value.detach().reshape(-1).split(held), strict=True):
        tensor.copy_(piece)

"""The sharded part of a run as logical tensors: which parts of them a rank writes, and where it wants them back.

value/<parameter>             the master weights, or the weights where nothing else is kept
optimizer/<key>/<parameter>   an optimizer state of at least one dimension
gradient/<parameter>          the sum since the last step, in the middle of an accumulation
buffer/<name>                 a persistent buffer of the model
rank/<r>/...                  what only rank r has: its random numbers, its own gradient or buffer, where that differs
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zerolith.checkpoint.content import Content, Part
from zerolith.checkpoint.disk import bytes_of
from zerolith.checkpoint.manifest import DTYPES, NAMES, Manifest, ParameterRecord, checksum
from zerolith.checkpoint.values import from_json, to_json
from zerolith.gradients import Gradients
from zerolith.layout import Range
from zerolith.member import Member
from zerolith.optim import PartitionedOptimizer, is_per_element
from zerolith.partitioning import REPLICATE
from zerolith.section import Section
from zerolith.sharded_model import ShardedModel


@dataclass(frozen=True, slots=True)
class Sharded:
    """What is saved and loaded here: the model's units, and the optimizer on them if there is one."""

    model: ShardedModel
    optimizer: PartitionedOptimizer | None

    @property
    def rank(self) -> int:
        return self.model.comm.rank

    def slots(self) -> Iterator[tuple[Section, Gradients | None, int, Member]]:
        """Every parameter once: its section, that section's gradients if it is trained, and its slot."""
        owns = {own.section: own for own in self.model.gradients} if self.optimizer is not None else {}
        for section in self.model.sections:
            for index, member in enumerate(section.members):
                yield section, owns.get(section), index, member

    def parameters(self) -> dict[str, ParameterRecord]:
        """What is known of each parameter without its states; the same on every rank."""
        names = _names_by_home(self.model.model)
        records = {}
        for section, _, _, member in self.slots():
            aliases = {name for module, attribute in member.homes for name in names.get((id(module), attribute), ())}
            records[member.name] = ParameterRecord(
                shape=list(member.param.shape),
                dtype=NAMES[section.weights.data.dtype],
                trained=member.trained,
                aliases=sorted(aliases - {member.name}),
            )
        return records


def add_parameters(content: Content, sharded: Sharded, *, exclude_frozen: bool, with_gradients: bool) -> None:
    """Add what this rank writes of parameters, states and gradients. Copies nothing."""
    cursor = _Cursor(sharded.optimizer)
    content.close = cursor.close
    for section, own, index, member in sharded.slots():
        if own is None:
            if not (exclude_frozen and not _wants_grad(section, index)):
                content.parts.append(_weight_to_write(section, index, member))
            continue
        cursor.go(own)
        _add_states(content, sharded, own, index, cursor)
        if not member.param.numel():  # no rank has a part of it
            content.parts.append(_part(f"value/{member.name}", member, Range(0, 0), member.param.detach().reshape(-1)))
        if with_gradients:
            content.parts += _gradient_parts(own, index, member.name)
    cursor.close()


class _Cursor:
    """Keeps the one section in memory whose parts are being looked at or written."""

    def __init__(self, optimizer: PartitionedOptimizer | None) -> None:
        self._residency = optimizer.residency if optimizer is not None else None
        self._here: tuple[Gradients, ExitStack] | None = None

    def go(self, own: Gradients) -> None:
        if self._residency is None or not self._residency.swaps(own) or (self._here and self._here[0] is own):
            return
        self.close()
        self._here = own, ExitStack()
        self._here[1].enter_context(self._residency.readable(own))

    def close(self) -> None:
        here, self._here = self._here, None
        if here is not None:
            here[1].close()

    def part(self, own: Gradients, part: Part) -> Part:
        """`part` of a section that is resident now, to be read when it is written if the section is on disk then."""
        if self._residency is None or not self._residency.swaps(own):
            return part
        data = part.data

        def make() -> Tensor:
            self.go(own)
            return data

        return replace(part, data=data.new_empty(data.shape, device="meta"), make=make)


def weight_parts(section: Section, names: set[str]) -> list[Part]:
    """Where this rank keeps the weights of those of these parameters that are in a section, which is near."""
    members = enumerate(section.members)
    return [_weight_part(section, index, member) for index, member in members if member.name in names]


def master_parts(optimizer: PartitionedOptimizer, own: Gradients, names: set[str]) -> list[Part]:
    """Where this rank keeps the masters of those of these parameters that are in a section, which is resident."""
    return [
        _part(f"value/{member.name}", member, part, param.detach().view(-1)[inside.start : inside.stop])
        for index, member in enumerate(own.section.members)
        if member.name in names
        for param, inside, part in optimizer.locate(own, index)
    ]


def state_keys(manifest: Manifest) -> dict[str, list[str]]:
    """The keys of states that are tensors, by parameter."""
    keys: dict[str, list[str]] = {}
    for name in manifest.tensors:
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            key, _, parameter = rest.partition("/")
            keys.setdefault(parameter, []).append(key)
    return keys


def state_parts(
    optimizer: PartitionedOptimizer, own: Gradients, manifest: Manifest, keys: Mapping[str, list[str]]
) -> list[Part]:
    """Make a resident section's states as the checkpoint has them, without their values; where those go."""
    members = own.section.members
    records = [manifest.parameters.get(member.name) for member in members]
    scalars = [record.optimizer if record is not None else None for record in records]
    described = [
        json.dumps([values, sorted(keys.get(member.name, ()))], sort_keys=True)
        for values, member in zip(scalars, members, strict=True)
    ]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(described))}
    before = optimizer.restart(own, [numbers[text] for text in described])
    memory = {id(piece.param): before.get(piece.range, {}) for piece in optimizer.pieces[own]}
    parts: list[Part] = []
    for index, member in enumerate(members):
        saved = scalars[index]
        if saved is None:
            continue
        for param, inside, part in optimizer.locate(own, index):
            state = optimizer.inner.state[param]
            if not state:
                state.update(_scalars(saved, param, optimizer.group_of(param)))
            for key in keys.get(member.name, ()):
                parts.append(_state_part(state, memory[id(param)], key, manifest, member, param, inside, part))
    return parts


def gradient_parts(sharded: Sharded, manifest: Manifest) -> tuple[list[Part], list[Callable[[], None]]]:
    """Where gradients of an unfinished accumulation go, and what to call when they are there."""
    parts: list[Part] = []
    after: list[Callable[[], None]] = []
    ranks = [sharded.rank] if manifest.num_ranks == sharded.model.comm.size else range(manifest.num_ranks)
    terms = [f"rank/{rank}/gradient/" for rank in ranks] if len(ranks) == 1 or sharded.rank == 0 else []
    for own in sharded.model.gradients:
        names = [member.name for member in own.section.members]
        if any(f"gradient/{name}" in manifest.tensors for name in names):
            total = own.to_restore()
            parts += [
                _part(f"gradient/{member.name}", member, owned, total.local(index))
                for index, member in enumerate(own.section.members)
                if (owned := own.section.layout.owned(index, sharded.rank)).numel
            ]
        for prefix in terms:
            for index, member in enumerate(own.section.members):
                if prefix + member.name in manifest.tensors:
                    grad = torch.zeros(member.param.shape, dtype=own.rest_dtype, device=sharded.model.comm.device)
                    parts.append(Part.whole(prefix + member.name, grad))
                    after.append(_collects(own, index, grad))
    return parts, after


def _collects(own: Gradients, index: int, grad: Tensor) -> Callable[[], None]:
    return lambda: own.collect(index, grad, reducing=False)


def buffer_parts(sharded: Sharded, manifest: Manifest) -> tuple[list[Part], list[Callable[[], None]]]:
    """Where buffers go, and what to call when they are there.

    This rank's own where it had one, at the same number of ranks; else rank 0's.
    """
    own = f"rank/{sharded.rank}/" if manifest.num_ranks == sharded.model.comm.size else "-"
    parts: list[Part] = []
    after: list[Callable[[], None]] = []
    for name, buffer in persistent_buffers(sharded.model.model).items():
        chosen = f"{own}buffer/{name}" if f"{own}buffer/{name}" in manifest.tensors else f"buffer/{name}"
        if chosen in manifest.tensors:
            target = buffer.contiguous()  # the buffer itself, unless its strides are odd
            parts.append(Part.whole(chosen, target))
            if target is not buffer:
                after.append(_copies(buffer, target))
    return parts, after


def _copies(target: Tensor, source: Tensor) -> Callable[[], None]:
    def copy() -> None:
        target.copy_(source)

    return copy


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model's state, under every name that its state dict has for them."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _names_by_home(model: nn.Module) -> dict[tuple[int, str], list[str]]:
    names: dict[tuple[int, str], list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute in module._parameters:
            name = f"{path}.{attribute}" if path else attribute
            names.setdefault((id(module), attribute), []).append(name)
    return names


def _wants_grad(section: Section, index: int) -> bool:
    current = section.stand_ins[index] if section.is_sharded else section.members[index].param
    return current.requires_grad


def _part(name: str, member: Member, part: Range, data: Tensor) -> Part:
    return Part(name=name, shape=tuple(member.param.shape), range=part, data=data)


def _weight_part(section: Section, index: int, member: Member) -> Part:
    own = section.weights.own()
    return _part(f"value/{member.name}", member, section.layout.owned(index, own.rank), own.local(index))


def _weight_to_write(section: Section, index: int, member: Member) -> Part:
    """The part as a save reads it: brought near when its turn comes, where weights rest elsewhere."""
    if not section.is_elsewhere:
        return _weight_part(section, index, member)
    owned = section.layout.owned(index, section.weights.rank)
    described = torch.empty(owned.numel, dtype=section.weights.data.dtype, device="meta")

    def make() -> Tensor:
        with section.near():
            return section.weights.local(index).clone()

    return replace(_part(f"value/{member.name}", member, owned, described), make=make)


def _add_states(content: Content, sharded: Sharded, own: Gradients, index: int, cursor: _Cursor) -> None:
    """The master and the optimizer's states of one parameter: this rank's part, or its share where all have all."""
    assert sharded.optimizer is not None, "only then a parameter has gradients"
    section, member = own.section, own.section.members[index]
    name = member.name
    is_everywhere = section.main is not None and section.main.placement is REPLICATE
    share = section.layout.owned(index, sharded.rank)
    for param, inside, part in sharded.optimizer.locate(own, index):
        mine = part.clip(share) if is_everywhere else part
        at = mine.shift(inside.start - part.start)
        value = param.detach().view(-1)[at.start : at.stop]
        content.parts.append(cursor.part(own, _part(f"value/{name}", member, mine, value)))
        state = sharded.optimizer.inner.state.get(param, {})
        rest: dict[str, Any] = {}
        for key, value in state.items():
            if is_per_element(key, value, param.shape):
                flat = value.detach().view(-1)[at.start : at.stop]
                content.parts.append(cursor.part(own, _part(f"optimizer/{key}/{name}", member, mine, flat)))
            else:
                rest[key] = value
        if state and mine.start == 0 and mine.numel:
            tensors = {key: value for key, value in rest.items() if isinstance(value, Tensor) and value.dim()}
            whole = [Part.whole(f"optimizer/{key}/{name}", value) for key, value in tensors.items()]
            content.parts += [cursor.part(own, part) for part in whole]
            plain = {key: value for key, value in rest.items() if key not in tensors}
            content.optimizer[name] = to_json(plain, where=f"optimizer state of {name}", tensors={})


def _gradient_parts(own: Gradients, index: int, name: str) -> Iterator[Part]:
    member, section = own.section.members[index], own.section
    if not own.fresh:
        shard = own.sum.own()
        yield _part(f"gradient/{name}", member, section.layout.owned(index, shard.rank), shard.local(index))
    if own.term is not None and own.term.filled[index]:
        yield Part.whole(f"rank/{own.comm.rank}/gradient/{name}", own.term.buffer.slot(index))


def add_buffers(content: Content, sharded: Sharded) -> None:
    """Rank 0's buffers, and those of others where they differ. Collective."""
    buffers = persistent_buffers(sharded.model.model)
    digests = {name: digest(buffer) for name, buffer in buffers.items()}
    rows = sharded.model.comm.all_gather_bytes(json.dumps(digests).encode(), name="digests of buffers")
    first = json.loads(rows[0])
    for name, buffer in buffers.items():
        if sharded.rank == 0:
            content.add_tensors({f"buffer/{name}": buffer})
        elif digests[name] != first.get(name):
            content.add_tensors({f"rank/{sharded.rank}/buffer/{name}": buffer})


def digest(tensor: Tensor) -> str:
    """The checksum of a tensor's bytes, wherever it is."""
    held = tensor.detach().cpu().contiguous()
    return checksum(bytes_of(held))


def _scalars(saved: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """A state's values that are not per element, as torch's load_state_dict would place them."""
    state = {key: from_json(value, tensor=_no_tensor) for key, value in saved.items()}
    on_device = bool(group.get("capturable") or group.get("fused"))
    for key, value in state.items():
        if isinstance(value, Tensor) and (key != "step" or on_device):
            state[key] = value.to(param.device)
    return state


def _no_tensor(name: str) -> Tensor:
    raise AssertionError(f"tensor {name!r} inside a parameter's scalar state: add_parameters writes none")


def _state_part(
    state: dict[str, Any],
    memory: Mapping[str, Any],
    key: str,
    manifest: Manifest,
    member: Member,
    param: Tensor,
    inside: Range,
    part: Range,
) -> Part:
    """Memory for the state `key` of a stepped tensor, made if it is the first of its parameters, and the part of it."""
    name = f"optimizer/{key}/{member.name}"
    record = manifest.tensors[name]
    dtype = DTYPES[record.dtype]
    dtype = param.dtype if dtype.is_floating_point and param.is_floating_point() else dtype
    if record.shape != list(member.param.shape):  # not per element
        state[key] = torch.zeros(record.shape, dtype=dtype, device=param.device)
        return Part.whole(name, state[key])
    if key not in state:
        old = memory.get(key)  # to touch new memory takes longer than to read what goes there
        if isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (param.shape, dtype, param.device):
            state[key] = old
        else:
            state[key] = torch.zeros(param.shape, dtype=dtype, device=param.device)
    return _part(name, member, part, state[key].view(-1)[inside.start : inside.stop])


def groups_of(optimizer: PartitionedOptimizer, where: str, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The options of each param group, and its parameters' names, as JSON."""
    members: list[list[str]] = [[] for _ in optimizer.inner.param_groups]
    for own in optimizer.gradients:
        for member in own.section.members:
            members[member.group].append(member.name)
    return [
        {"params": sorted(names), "options": to_json(_options(group), where=f"{where}[{number}]", tensors=tensors)}
        for number, (names, group) in enumerate(zip(members, optimizer.inner.param_groups, strict=True))
    ]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}

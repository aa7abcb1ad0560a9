"""The flat buffers of some parameters that share dtype, and whether and how they are trained.

A section owns, over one Layout:

    weights  compute dtype, params placement          what forward reads; publish() writes it
    whole    compute dtype, REPLICATE                 `param.data` are views of it; is `weights` where params rest whole
    main     master dtype, optim placement, or None   what the optimizer writes; is `weights` where the two agree
    grads    accumulation dtype, optim placement      the sum over ranks and micro-batches; None if frozen
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor, nn

from zerolith.buffer import FlatBuffer
from zerolith.comm import Comm, Pending
from zerolith.departures import Landing
from zerolith.layout import plan_layout
from zerolith.member import Granularity, Member
from zerolith.memory import Residency, Store
from zerolith.memory.lane import Copier
from zerolith.parameter import ShardedParameter, Touch, absent, refuse_away
from zerolith.partitioning import REPLICATE, SHARD, Partitioning
from zerolith.precision import Precision
from zerolith.redistribute import Then, redistribute


class _Weights:
    """What of a section rests elsewhere."""

    def kept(self, section: Section) -> list[Tensor]:
        return [section.weights.data]

    def show(self, section: Section) -> None:
        """Nobody else sees them."""

    hide = show


def weights_in(store: Store | None) -> Residency[Section]:
    """Shards of weights that rest in `store`, or in their own memory without one."""
    return Residency(store, _Weights(), goes=lambda section: section.is_sharded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every section of an engine shares."""

    partitioning: Partitioning
    precision: Precision
    comm: Comm
    master_device: torch.device | None = None  # where offloaded masters are stepped; None: where the weights are
    offloaded_share: float = 1.0  # of the trained elements
    copier: Copier | None = None  # between the device and host memory where masters are stepped there
    residency: Residency[Section] = field(default_factory=lambda: weights_in(None))  # of shards of weights


class Section:
    """Owner of the buffers of `members`. Building one broadcasts rank 0's values: collective."""

    def __init__(
        self,
        members: Sequence[Member],
        plan: Plan,
        *,
        name: str,
        touch: Touch,
        owners: Sequence[int] = (),
        is_offloaded: bool = True,
    ) -> None:
        self.name = name
        self.is_offloaded = is_offloaded  # whether masters and optimizer states rest where the plan says, else here
        self.members = list(members)
        self.plan = plan
        self.granularity = members[0].granularity
        self.keeps_memory = False  # of `whole` while it is released: where it stands at the step's peak anyway
        self.is_away = False  # whether the weights have no memory
        self.is_cast = False  # whether the masters' new values are in `cast_target` already
        self.landing: Landing | None = None  # host memory in which they wait for the way to the weights
        self.trained = members[0].trained
        self.layout = plan_layout(
            [member.param.shape for member in members],
            num_shards=plan.comm.size,
            groups=[member.group for member in members],
        )
        packed = self._pack()
        compute = plan.precision.compute_dtype(packed.data.dtype)
        self.whole = FlatBuffer(self.layout, REPLICATE, packed.data.to(compute), rank=packed.rank)
        self.weights = self.whole if plan.partitioning.params is REPLICATE else self.whole.copy(SHARD, compute)
        self.resident: Callable[[], AbstractContextManager[None]] = nullcontext  # in which masters may be touched
        self.settle: Callable[[], None] = lambda: None  # waits for an update that runs behind
        self.failure: BaseException | None = None  # of the last update: until they are published, weights are not new
        self.is_split = False  # whether masters rest as what the weights lack, and are lost if those change
        self.is_behind = False  # whether one was begun since the weights were last gathered: so on every rank
        self.is_ahead = False  # whether this step's was begun in its backward: nobody may look before the step
        self.at_rest = self.is_sharded  # and not whole, nor about to be
        self.owners = list(owners)  # rank that steps each tensor, where whole tensors are stepped on shards
        self.main = self._make_main(packed)
        self.masters = self._make_masters(packed)  # by index: whole tensors that this rank owns, master dtype
        self.grads = self._make_grads()
        self._views = [self.whole.slot(index) for index in range(len(self.members))]
        # What parameters hold while `whole` is released.
        self._absent = [absent(view) for view in self._views] if self.is_sharded else []
        self.stand_ins = self._make_stand_ins(touch)
        for member, view in zip(self.members, self._views, strict=True):
            member.param.data = view  # its old storage goes
            member.param.grad = None
            member.install(member.param)
            member.whole = None
        self._wanted_grads = [member.param.requires_grad for member in self.members]
        for index, member in enumerate(self.members):
            if member.stand_in is not None:  # an optimizer or the user may keep it: its memory is ours from now on
                member.stand_in.local, member.stand_in.origin = self.weights.own().local(index), None
                member.stand_in.owned = self.layout.owned(index, packed.rank)
        self._versions = self._current_versions()
        self.drop_edits()
        if self.is_sharded:
            self.release()
        with self.near(to_write=True):
            pass  # from here on they are elsewhere, if at all

    @property
    def is_sharded(self) -> bool:
        """Whether parameters rest as shards, so that `whole` must be gathered before use."""
        return self.weights is not self.whole

    @property
    def has_masters_elsewhere(self) -> bool:
        """Whether what a rank has of the weights is not what it has of the masters."""
        return self.trained and self.main is None and self.is_sharded

    @property
    def is_elsewhere(self) -> bool:
        """Whether the weights are in memory only while someone is `near`."""
        return self.plan.residency.swaps(self)

    @property
    def master_device(self) -> torch.device | None:
        return self.plan.master_device if self.is_offloaded else None

    def near(self, *, to_write: bool = False) -> AbstractContextManager[None]:
        """Inside, weights at rest may be read, and written if told."""
        self.settle()
        residency = self.plan.residency
        return residency.resident(self) if to_write else residency.readable(self)

    def read_ahead(self) -> None:
        """Begin to bring weights near that rest elsewhere."""
        self.plan.residency.prefetch(self)

    def start_gather(self) -> Pending:
        """Begin to fill `whole` from the shards. Collective."""
        if self.is_away:
            refuse_away()
        self.is_behind = False
        self.whole.allocate()
        with ExitStack() as here:
            here.enter_context(self.near())
            moved = redistribute(self.weights, self.whole, comm=self.plan.comm, name=self.name)
            return Then(moved, here.pop_all().close)

    def install_whole(self) -> None:
        """Put the real parameters back into their modules."""
        self._follow_requires_grad()
        for member, stand_in, view in zip(self.members, self.stand_ins, self._views, strict=True):
            member.param.data = view
            member.install(member.param, instead_of=stand_in)
            stand_in.gathered = member.param
        self.drop_edits()

    def release(self) -> None:
        """Put stand-ins into the modules and let `whole` go. What was written to parameters in place is kept."""
        if self._whole_versions != [member.param._version for member in self.members]:
            with self.near(to_write=True):
                self.weights.data.copy_(self.whole.own().data)
        self._follow_requires_grad()
        for member, stand_in, nothing in zip(self.members, self.stand_ins, self._absent, strict=True):
            member.param.data = nothing
            member.install(stand_in, instead_of=member.param)
            stand_in.gathered = None
        if not self.keeps_memory:
            self.whole.release()

    def _follow_requires_grad(self) -> None:
        """People switch it on a parameter or on its stand-in, whichever they hold: the other one follows."""
        for index, (member, stand_in) in enumerate(zip(self.members, self.stand_ins, strict=True)):
            if member.param.requires_grad != stand_in.requires_grad:
                self._wanted_grads[index] = not self._wanted_grads[index]  # the one that has changed says so
                for tensor in (member.param, stand_in):
                    tensor.requires_grad_(self._wanted_grads[index])
            self._wanted_grads[index] = member.param.requires_grad

    def replaced(self, model: nn.Module) -> str:
        """Name of a trained parameter that `model` no longer holds, or not in our memory; "" if there is none."""
        if not self.trained:
            return ""
        stand_ins: Sequence[Tensor | None] = self.stand_ins or [None] * len(self.members)
        for member, stand_in, view in zip(self.members, stand_ins, self._views, strict=True):
            is_here = self.is_sharded or member.param.data_ptr() == view.data_ptr()
            if not is_here or not (member.is_held(stand_in) or _is_within(model, member.param, stand_in)):
                return member.name
        return ""

    def drop_edits(self) -> None:
        """Forget what was written to the whole parameters since they were gathered."""
        self._whole_versions = [member.param._version for member in self.members]

    def start_publish(self) -> Pending:
        """Begin to bring the optimizer's result to the weights. Collective where params rest whole."""
        with ExitStack() as here, self.resident():  # what is sent is copied before the sending begins
            here.enter_context(self.near(to_write=True))
            source = self.main if self.main is not None else self.weights.own()
            if self.landing is not None and not self.is_cast:
                self.landing.there.data.copy_(source.own().data)
                self.is_cast = True
            source = (self.cast_target if self.is_cast else None) or source
            moved = redistribute(source, self.weights, comm=self.plan.comm, name=self.name)
            here.callback(self.mark_written)
            self.drop_result()  # what is sent has been copied from there
            return Then(moved, here.pop_all().close)

    def drop_result(self) -> None:
        """Forget what a step has made and nobody will publish."""
        self.is_cast = False
        if self.landing is not None:
            self.landing.give_back()
            self.landing = None

    @property
    def cast_target(self) -> FlatBuffer | None:
        """Where a step may put its result in the dtype of the weights; None if masters are those, or elsewhere."""
        if self.landing is not None:
            return self.landing.there
        is_early = self.is_ahead and not self.is_sharded  # the weights are in sight, and the step is still to come
        if is_early or self.main is None or self.main.shares_memory_with(self.weights) or self.is_elsewhere:
            return None
        if self.main.data.device != self.weights.data.device:
            return None
        return self.weights.own() if self.main.placement is SHARD else self.weights

    def put_away(self, *, weights: bool) -> None:
        """Masters, and `weights` too if told, are about to lose their memory: refuse to touch them."""
        self._before_away, self.resident = self.resident, refuse_away
        self.is_away = weights
        if weights and self.is_sharded:
            self.whole.release()
        elif weights:
            for member, view in zip(self.members, self._views, strict=True):
                member.param.data = absent(view)

    def take_back(self) -> None:
        """All have their memory and values again."""
        self.resident = self._before_away
        if self.is_away:
            self.is_away = False
            if not self.is_sharded:
                for member, view in zip(self.members, self._views, strict=True):
                    member.param.data = view
            self.mark_written()

    def mark_written(self) -> None:
        """Tell autograd and `edited()` that the weights' content is ours and new."""
        self.failure = None
        for member in self.members:
            torch.autograd.graph.increment_version(member.param)
        self._versions = self._current_versions()
        self.drop_edits()

    def edited(self) -> bool:
        """Whether someone else wrote to the weights in place since `mark_written`."""
        return self._versions != self._current_versions()

    def adopt_edits(self) -> None:
        """Let the masters follow weights that were written to; `whole` must be there if masters are elsewhere."""
        edited = [True] * len(self.members)
        if not self.is_sharded:
            edited = [before != now for before, now in zip(self._versions, self._current_versions(), strict=True)]
        with self.resident(), self.near():
            if self.main is not None and all(edited):
                source = self.weights.own() if self.main.placement is SHARD else self.weights
                _follow(self.main.data, source.data)
            elif self.main is not None:  # the others' masters may have been set, and their weights not yet
                for index in compress(range(len(edited)), edited):
                    _follow(self.main.local(index), self._held(index, self.main))
            for index, master in self.masters.items():
                if edited[index]:
                    _follow(master, self.whole.slot(index))
        self._versions = self._current_versions()

    def adopt_slot(self, index: int) -> None:
        """Keep what was written to the whole tensor `index`, which is the same on every rank."""
        with self.resident():  # around all of it: split masters are made from the weights as they were
            self.write_slot(index, self.whole.slot(index).reshape(-1))
            if self.main is not None:
                _follow(self.main.local(index), self._held(index, self.main))
            if index in self.masters:
                _follow(self.masters[index], self.whole.slot(index))

    def write_slot(self, index: int, flat: Tensor) -> None:
        """Make `flat`, the whole tensor `index` flattened and equal on every rank, the weights' content."""
        part = self.layout.owned(index, self.weights.own().rank)
        self.write_part(index, flat[part.start : part.stop])
        if not self.is_sharded or self.stand_ins[index].gathered is not None:
            self.whole.slot(index).copy_(flat.view(self.members[index].param.shape))

    def write_part(self, index: int, flat: Tensor) -> None:
        """Make `flat` what this rank owns of tensor `index`. Other edits that wait to be adopted go on waiting."""
        waits = self.is_sharded and self.edited()
        with self.near(to_write=True):
            self.weights.own().local(index).copy_(flat)
        if not self.is_sharded:
            self._versions[index] = self.members[index].param._version
        elif not waits:
            self._versions = self._current_versions()

    def slot_differs(self, index: int) -> bool:
        """Whether the whole tensor `index` differs from the shard at rest, on this rank's part."""
        with self.near():
            return not torch.equal(self._held(index, self.weights), self.weights.local(index))

    def _held(self, index: int, buffer: FlatBuffer) -> Tensor:
        """The part of the whole tensor `index` that `buffer` holds."""
        return self.whole.at(self.layout.slots[index].span.clip(buffer.range))

    def _current_versions(self) -> list[int]:
        if self.is_sharded:
            return [self.weights.data._version]
        return [member.param._version for member in self.members]

    def _pack(self) -> FlatBuffer:
        """All members side by side with rank 0's values, REPLICATE, in their own dtype."""
        comm, first = self.plan.comm, self.members[0].param
        packed = FlatBuffer.empty(self.layout, REPLICATE, rank=comm.rank, dtype=first.dtype, device=comm.device)
        packed.zero_gaps()
        with torch.no_grad():
            for index, member in enumerate(self.members):
                packed.slot(index).copy_(member.whole() if member.whole else member.param)
        comm.broadcast(packed.data, name=self.name)
        return packed

    def _make_main(self, packed: FlatBuffer) -> FlatBuffer | None:
        optim = self.plan.partitioning.optim
        if not self.trained or (self.granularity is Granularity.TENSOR and optim is SHARD):
            return None  # frozen; or the owners of whole tensors hold the master
        dtype = self.plan.precision.master_dtype(packed.data.dtype)
        device = self.master_device
        is_here = device in (None, self.weights.data.device) and not self.is_elsewhere
        if dtype == self.weights.data.dtype and is_here:
            return self.weights.own() if optim is SHARD else self.weights
        return packed.copy(optim, dtype, device=device)

    def _make_masters(self, packed: FlatBuffer) -> dict[int, Tensor]:
        if self.main is not None or not self.trained:
            return {}
        dtype = self.plan.precision.master_dtype(packed.data.dtype)
        mine = [index for index, owner in enumerate(self.owners) if owner == packed.rank]
        return {index: packed.slot(index).to(self.master_device, dtype, copy=True) for index in mine}

    def _make_grads(self) -> FlatBuffer | None:
        if not self.trained:
            return None
        comm, optim = self.plan.comm, self.plan.partitioning.optim
        dtype = self.plan.precision.accumulate_dtype(self.members[0].param.dtype)
        grads = FlatBuffer.empty(self.layout, optim, rank=comm.rank, dtype=dtype, device=comm.device)
        grads.release()  # until the first gradient comes
        return grads

    def _make_stand_ins(self, touch: Touch) -> list[ShardedParameter]:
        if not self.is_sharded:
            return []
        return [
            ShardedParameter(
                member.param.shape,
                self.weights.local(index),
                self.layout.owned(index, self.weights.rank),
                fqn=member.name,
                touch=touch,
                requires_grad=member.param.requires_grad,
            )
            for index, member in enumerate(self.members)
        ]


def _is_within(model: nn.Module, *ours: Tensor | None) -> bool:
    """Whether one of `ours` is somewhere in `model`, under whatever name: pruning gives a parameter another."""
    return any(each is own for each in model.parameters() for own in ours)


def _follow(master: Tensor, weights: Tensor) -> None:
    """Where `weights` is not what `master` was published as, take it; elsewhere the master keeps its precision."""
    if master.untyped_storage().data_ptr() != weights.untyped_storage().data_ptr():
        weights = weights.to(master.device)
        changed = weights != master.to(weights.dtype)
        master.copy_(torch.where(changed, weights.to(master.dtype), master))

"""A model's parameters as units, and everything that acts on all of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zerolith.comm import Comm
from zerolith.errors import OffloadError, UsageError
from zerolith.gradients import Gradients, Reducer
from zerolith.hooks import Gatherer
from zerolith.layout import assign_owners
from zerolith.member import Member
from zerolith.parameter import ShardedParameter, Touch, refuse
from zerolith.section import Plan, Section
from zerolith.unit import Phase, Unit, Until, refuse_ahead
from zerolith.wrap import UnitPlan, WrapPolicy, living, plan_units, split_members


@dataclass(frozen=True, slots=True)
class Place:
    """Where one parameter lives."""

    unit: Unit
    section: Section
    index: int  # its slot in the section

    @property
    def member(self) -> Member:
        return self.section.members[self.index]


class ShardedModel:
    """Owner of the units of `model`. Building it moves every parameter into flat buffers: collective."""

    def __init__(
        self,
        model: nn.Module,
        members: Sequence[Member],
        plan: Plan,
        policy: WrapPolicy,
        *,
        overlap: bool,
        prefetch: bool,
    ) -> None:
        self.model = model
        self.plan = plan
        self.comm: Comm = plan.comm
        self.residency = plan.residency
        self._loads = [0.0] * plan.comm.size  # of the owners of whole tensors
        trained = sum(member.param.numel() for member in members if member.trained)
        self._room = (1 - plan.offloaded_share) * trained  # for elements whose masters and states stay here
        plans = plan_units(model, members, policy)
        lives = living(plans, max_numel=policy.max_live_numel)
        until = [Until.STEP if plan in lives else Until.USED for plan in plans]
        until[0] = Until.BACKWARD if plans[0] not in lives else until[0]
        self.units = [self._make_unit(*each, policy) for each in zip(plans, until, strict=True)]
        self._places = {  # of parameters and their stand-ins, by id: their sections keep them alive
            id(tensor): Place(unit, section, index)
            for unit in self.units
            for section in unit.sections
            for tensors in ([member.param for member in section.members], section.stand_ins)
            for index, tensor in enumerate(tensors)
        }
        for section in self.sections:
            before = [member.stand_in for member in section.members if member.stand_in is not None]
            for stand_in in [*section.stand_ins, *before]:
                stand_in.settle = _settles(section)
        # Backward meets the last unit first; the root, which is used at both ends, completes last.
        self.gradients = [
            Gradients(section, plan.partitioning, plan.precision, plan.comm)
            for section in reversed(self.sections)
            if section.trained
        ]
        self.reducer = Reducer(self.gradients, plan.comm, overlap=overlap)
        modules = [unit_plan.module for unit_plan in plans]
        self.blocks = modules[1:] or modules  # what is computed at a time: the units' modules, or all
        self.gatherer = Gatherer(model, self.units, modules, prefetch=prefetch, when_done=self._reduces_done())
        self._handles = [*self._rest_for_state_dicts(), *self._drop_untrained_grads()]
        self._broadcast_buffers()

    @property
    def sections(self) -> list[Section]:
        return [section for unit in self.units for section in unit.sections]

    def place_of(self, param: Tensor) -> Place | None:
        """Where `param`, a real parameter or its stand-in, lives; None if it is not of this model."""
        return self._places.get(id(param))

    def gradients_of(self, section: Section) -> Gradients | None:
        return next((own for own in self.gradients if own.section is section), None)

    def settle(self) -> None:
        """Wait for updates that run behind. Does not communicate. Raises OffloadError if one has failed here."""
        for section in self.sections:
            _settle(section)

    def release_all(self) -> None:
        self.gatherer.release_all()

    @torch.no_grad()
    def publish(self, sections: Sequence[Section]) -> None:
        """Bring masters to the weights, and each rank's shard of weights without masters to the others.

        Every gathered copy is dropped. Collective.
        """
        self.release_all()
        for some in [[section] for section in sections] if self.residency.is_swapped else [sections]:
            for pending in [section.start_publish() for section in some]:
                pending.wait()

    @torch.no_grad()
    def adopt_edits(self) -> list[str]:
        """Let masters follow weights that were written to in place; returns the sections' names.

        Collective where tensors are stepped whole but rest as shards. Raises UsageError if a parameter was replaced.
        """
        replaced = next(filter(None, (section.replaced(self.model) for section in self.sections)), "")
        if replaced:
            raise UsageError(
                f"the model no longer holds the parameter {replaced!r} that initialize took: an assignment, `.data =`, "
                "or a change of dtype or device has put other memory in its place. Change it before initialize"
            )
        self.release_all()
        edited = [each for each in self.sections if each.trained and not each.is_ahead and each.edited()]
        elsewhere = [section for section in self.sections if section.has_masters_elsewhere]
        if elsewhere:
            flags = self.comm.max([float(section in edited) for section in elsewhere], name="edited weights")
            edited = [section for section in edited if section not in elsewhere]
            edited += [section for section, flag in zip(elsewhere, flags, strict=True) if flag]
        for section in edited:
            if section.has_masters_elsewhere:
                section.start_gather().wait()
            section.adopt_edits()
            if section.has_masters_elsewhere:
                section.whole.release()
        return [section.name for section in edited]

    def check_frozen(self) -> None:
        """Raise UsageError if a parameter that no optimizer group holds wants to be trained."""
        for section in self.sections:
            if section.trained:
                continue
            for index, member in enumerate(section.members):
                current = section.stand_ins[index] if section.is_sharded else member.param
                if current.requires_grad and not member.wanted_grad:
                    raise UsageError(
                        f"{member.name!r} was frozen and in no optimizer group when initialize ran, so it has no "
                        "master weights and cannot be trained now. Put it into the optimizer before initialize (it may "
                        "stay frozen until you need it), or make a new engine."
                    )

    def reset(self) -> None:
        """Back to rest after an exception: gradients since the last step are dropped."""
        self.reducer.reset()
        self.gatherer.reset()
        for section in self.sections:
            section.drop_result()

    def detach(self) -> None:
        """Take every hook off the model; parameters stay where they are."""
        self.release_all()
        self.gatherer.remove_hooks()
        self.reducer.remove_hooks()
        for handle in self._handles:
            handle.remove()

    def drop_memory(self) -> None:
        """Give back what is kept from step to step."""
        self.comm.pool.clear()
        for unit in self.units:
            for section in unit.sections if unit.phase is Phase.REST else ():
                section.whole.release()

    def _make_unit(self, plan: UnitPlan, until: Until, policy: WrapPolicy) -> Unit:
        sections = []
        touch = self._toucher()
        buckets = split_members(plan.members, bucket_numel=policy.bucket_numel)
        for number, members in enumerate(buckets):
            section = Section(
                members,
                self.plan,
                name=f"{plan.name}[{number}]",
                touch=touch,
                owners=assign_owners([member.param.shape for member in members], self._loads),
                is_offloaded=not self._takes_room(members),
            )
            section.keeps_memory = until is not Until.USED
            sections.append(section)
        return Unit(plan.name, sections, until=until)

    def _takes_room(self, members: Sequence[Member]) -> bool:
        """Whether masters and states of a section stay here. Those of the first units do: forward needs them first."""
        numel = sum(member.param.numel() for member in members if member.trained)
        stays = numel <= self._room
        self._room -= numel if stays else 0
        return stays

    def _toucher(self) -> Touch:
        """What a stand-in asks for the whole parameter."""
        this = weakref.ref(self)  # the stand-ins are ours: no cycle

        def touch(stand_in: ShardedParameter, together: Sequence[ShardedParameter]) -> Tensor:
            sharded = this()
            place = sharded.place_of(stand_in) if sharded is not None else None
            if sharded is None or place is None:
                return refuse(stand_in)
            return sharded.gatherer.touch(place.unit, stand_in, place.member.param)

        return touch

    def _reduces_done(self) -> Callable[[Unit], None]:
        """What tells the reducer that a unit's backward is over."""
        reducer = self.reducer  # not self: that would be a cycle
        numbers = {own.section: number for number, own in enumerate(self.gradients)}

        def when_done(unit: Unit) -> None:
            for section in reversed(unit.sections):
                if section.trained:
                    reducer.ready(numbers[section])

        return when_done

    def _rest_for_state_dicts(self) -> list[Any]:
        """State dicts are saved from and loaded into parameters at rest."""
        this, original = weakref.ref(self), weakref.ref(self.model)

        def rest(module: nn.Module, *_: Any) -> None:
            sharded = this()
            if sharded is not None and module is original():  # a deep copy of the model has the same hooks
                sharded.settle()
                sharded.release_all()

        def refuse_to_assign(module: nn.Module, state: Any, prefix: str, local: dict[str, Any], *_: Any) -> None:
            if this() is not None and local.get("assign_to_params_buffers"):
                raise UsageError("load_state_dict(assign=True) would replace the engine's parameters; leave assign out")

        return [
            self.model.register_state_dict_pre_hook(rest),
            self.model.register_load_state_dict_pre_hook(refuse_to_assign),
            self.model.register_load_state_dict_pre_hook(rest),
        ]

    def _broadcast_buffers(self) -> None:
        with torch.no_grad():
            for module in self.model.modules():
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = self._cast_buffer(module, self._broadcast_buffer(module, name, buffer))

    def _broadcast_buffer(self, module: nn.Module, name: str, buffer: Tensor) -> Tensor:
        """`buffer` with rank 0's values, or another tensor where the same memory cannot hold them."""
        if self.comm.size == 1:
            return buffer
        if buffer.layout is not torch.strided:
            kind = type(module).__name__
            raise UsageError(f"the buffer {name!r} of a {kind} is sparse, which ranks cannot exchange")
        dense = buffer.contiguous()
        as_bytes = dense.view(-1).view(torch.uint8)  # collectives do not know all dtypes
        self.comm.broadcast(as_bytes, name=f"buffer {name}")
        try:
            return buffer if dense is buffer else buffer.copy_(dense)
        except RuntimeError:  # some elements share their memory: an expanded tensor
            return dense

    def _cast_buffer(self, module: nn.Module, buffer: Tensor) -> Tensor:
        """`buffer` in the compute dtype if it is computed with parameters that are cast: a norm's statistics.

        Those of modules without parameters stay: rotary frequencies would lose what they never get back.
        """
        has_own = any(param is not None for param in module._parameters.values())
        compute = self.plan.precision.compute
        return buffer.to(compute) if has_own and compute and buffer.is_floating_point() else buffer

    def _drop_untrained_grads(self) -> list[Any]:
        """Trainable parameters outside every optimizer group: nobody will step or clear their gradients."""

        def drop(param: Tensor) -> None:
            param.grad = None

        return [
            member.param.register_post_accumulate_grad_hook(drop)
            for section in self.sections
            for member in section.members
            if not member.trained and member.wanted_grad
        ]


def _settles(section: Section) -> Callable[[], None]:
    """Its `settle` for a stand-in, which must not keep the section alive."""
    this = weakref.ref(section)

    def settle() -> None:
        section = this()
        if section is not None:
            _settle(section)

    return settle


def _settle(section: Section) -> None:
    refuse_ahead(section)
    section.settle()
    if section.failure is not None:
        raise OffloadError(
            f"the last update of {section.name} failed, so its weights are not new ({section.failure}); go on from a "
            "checkpoint"
        ) from section.failure

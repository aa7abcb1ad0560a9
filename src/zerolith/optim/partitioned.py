"""A torch optimizer on this rank's part of the masters.

The optimizer object and its param_group dicts stay the client's own; only the tensors in `group["params"]` are
replaced, by flat pieces of the masters (ELEMENT) or by whole tensors (TENSOR).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.comm import Comm, agree
from zerolith.errors import OffloadError, OptimizerError
from zerolith.gradients import Gradients
from zerolith.layout import Range, merge_runs
from zerolith.memory import Residency, SwapFile
from zerolith.optim.behind import Behind, alike, can_run_behind, options_of
from zerolith.optim.exchange import WholeTensors
from zerolith.optim.one_pass import OnePass
from zerolith.optim.split_masters import SplitMasters, can_split
from zerolith.section import Granularity, Section

SMALLEST_KEPT = 4096  # bytes of a state that is worth a place on disk

State = dict[str, Any]  # what an optimizer keeps for one tensor: tensors and anything else


@dataclass(eq=False)
class Piece:
    """A range of a section's master that the optimizer steps as one tensor."""

    gradients: Gradients
    range: Range  # of the section's layout; whole slots or parts of them, gaps included
    group: int
    param: nn.Parameter  # shape of the range, or of the slot where tensors are stepped whole

    def slots(self) -> list[int]:
        """The parameters of which this piece holds something."""
        layout = self.gradients.section.layout
        return [i for i, slot in enumerate(layout.slots) if slot.padded.clip(self.range).numel]


class PartitionedOptimizer:
    """Owner of the pieces of all sections; steps them with `inner`."""

    def __init__(
        self,
        inner: Optimizer,
        gradients: Sequence[Gradients],
        comm: Comm,
        *,
        swap: SwapFile | None = None,
        overlaps: bool = False,  # let updates of what is offloaded run behind the next forward, where they may
        splits: bool = False,  # keep masters as what their weights lack, where that can be
    ) -> None:
        self.inner = inner
        self.comm = comm
        self.gradients = list(gradients)
        self.whole = {own: WholeTensors(own.section, comm) for own in gradients if own.section.main is None}
        self.pieces = {own: self._cut(own) for own in gradients}
        self.is_stepping = False
        self._given = [group["params"] for group in inner.param_groups]
        given = {id(param): state for param, state in inner.state.items()}
        inner.state.clear()
        self._carry_over(given)
        self._hidden: dict[nn.Parameter, State] = {}  # of pieces that are not in memory
        self.is_split = splits
        self.residency = self._make_residency(swap)
        self._behind = Behind(comm.device)
        self._is_behind = False  # whether updates have begun since `catch_up`
        self._hand_over(*self.gradients)
        for own in self.gradients:
            own.runs_behind = overlaps and can_run_behind(inner, own)
            own.section.resident = partial(self._resident, own)
            with self.residency.resident(own):
                pass  # from here on it is on disk

    def step(
        self,
        used: Sequence[Sequence[bool]],
        publish: Callable[[Sequence[Section]], None],
        *,
        grad_factor: float = 1.0,
    ) -> None:
        """Step every piece whose parameters had a gradient; `publish` then brings sections' masters to the weights.

        Gradients are multiplied by `grad_factor`. used: per section, per parameter. A parameter without a gradient on
        any rank keeps its value, its momentum and its own step count. Collective. Raises OffloadError, on every rank,
        if a state cannot be brought from disk or back to it; weights and states are a mixture of two steps then. Where
        updates run behind, it is `catch_up` that raises it.
        """
        self._check_groups()
        flags_of = dict(zip(self.gradients, used, strict=True))
        error = self._cut_by_use(flags_of)
        behind = {own: flags for own, flags in flags_of.items() if own.runs_behind}
        swapped = {own: flags_of[own] for own in self.gradients if self.residency.swaps(own) and own not in behind}
        here = {own: flags_of[own] for own in self.gradients if own not in behind and own not in swapped}
        if here or behind:  # a step of nothing, too: schedulers look for one
            self._step_together(here, self.inner, grad_factor)
            publish([own.section for own in here])
        if swapped:
            self._step_in_turn(swapped, publish, grad_factor, error)
        if behind:
            self._step_behind(behind, grad_factor, error)

    def catch_up(self) -> None:
        """Wait for updates that run behind. Collective, if a step has begun any since the last time.

        Raises OffloadError on every rank if one has failed, as `step` does.
        """
        if not self._is_behind:
            return
        self._is_behind = False
        self._behind.settle_all()
        for own in self.gradients:
            own.section.is_behind = False
        try:
            agree(self.comm, self._behind.take_error(), doing="an update behind the forward", kind=OffloadError)
        except OffloadError:
            self.residency.abandon()
            raise

    def _make_residency(self, swap: SwapFile | None) -> Residency[Gradients]:
        if not self.is_split:
            return Residency(swap, self, goes=lambda own: own.section.is_offloaded)
        for own in self.gradients:
            own.section.is_split = can_split(own.section)
        store = SplitMasters(own.section for own in self.gradients if own.section.is_split)
        return Residency(store, self, goes=lambda own: own.section.is_split)

    def _cut_by_use(self, used: Mapping[Gradients, Sequence[bool]]) -> OffloadError | None:
        """Cut pieces of which only some parameters had a gradient; after an error, which is returned, all are here."""
        try:
            for own, flags in used.items():
                if self._mixes_use(own, flags):
                    with self.residency.resident(own):
                        self.pieces[own] = [part for piece in self.pieces[own] for part in self._by_use(piece, flags)]
                        self._hand_over(own)
        except OffloadError as error:
            self.residency.abandon()
            return error
        return None

    def _step_in_turn(
        self,
        used: Mapping[Gradients, Sequence[bool]],
        publish: Callable[[Sequence[Section]], None],
        grad_factor: float,
        error: OffloadError | None,
    ) -> None:
        """A section at a time, as they come into memory; raises what went wrong here or before, on every rank."""
        following = [*used][1:] + [*used][:1]
        for (own, flags), after in zip(used.items(), following, strict=True):
            is_stepped = False
            try:
                with self.residency.resident(own):
                    self.residency.prefetch(after)
                    self._step_together({own: flags}, self.inner, grad_factor)
                    publish([own.section])
                    is_stepped = True
            except OffloadError as caught:
                error = caught
                self.residency.abandon()
                if not is_stepped:  # the other ranks wait for this one's part, whatever is in it
                    self._step_together({own: flags}, self.inner, grad_factor)
                    publish([own.section])
        try:
            agree(self.comm, error, doing="stepping from disk", kind=OffloadError)
        except OffloadError:
            self.residency.abandon()  # on every rank, so that all of them step alike if they load and go on
            raise

    def _step_behind(
        self, used: Mapping[Gradients, Sequence[bool]], grad_factor: float, error: OffloadError | None
    ) -> None:
        """Let them be stepped in the order in which forward meets them."""
        self._is_behind, self._behind.error = True, error
        order, options = [*used][::-1], options_of(self.inner)

        def update(own: Gradients, after: Gradients) -> None:
            params: list[list[Tensor]] = [[] for _ in options]
            for piece in self.pieces[own]:
                params[piece.group].append(piece.param)
            try:
                with self.residency.resident(own):
                    self.residency.prefetch(after)
                    self._step_together({own: used[own]}, alike(self.inner, options, params), grad_factor)
                    own.section.start_publish().wait()
            except OffloadError:
                self.residency.abandon()
                raise

        following = order[1:] + order[:1]
        self._behind.start({own: partial(update, own, after) for own, after in zip(order, following, strict=True)})

    def _resident(self, own: Gradients) -> AbstractContextManager[None]:
        self._behind.settle(own)
        return self.residency.resident(own)

    def here(self) -> list[Gradients]:
        """Sections that are always in memory."""
        return [own for own in self.gradients if not self.residency.swaps(own)]

    def _step_together(self, used: Mapping[Gradients, Sequence[bool]], inner: Optimizer, grad_factor: float) -> None:
        """Step the pieces of some sections with `inner`, which has the options."""
        is_one_pass = isinstance(inner, OnePass)
        for own, flags in used.items():
            if not is_one_pass:
                own.scale(grad_factor)
            self._set_grads(own, flags)
        self.is_stepping = inner is self.inner
        try:
            if isinstance(inner, OnePass):
                inner.grad_factor = grad_factor
                inner.outs = dict(chain.from_iterable(map(self._casts, used)))
            inner.step()
            for own in used:
                own.section.is_cast = is_one_pass and own.section.cast_target is not None
        finally:
            self.is_stepping = False
            for group in inner.param_groups:
                for param in group["params"]:
                    param.grad = None
        for own in used:
            if own in self.whole:
                with own.section.near(to_write=True):
                    self.whole[own].put_values(own.section.weights.own())

    def kept(self, own: Gradients) -> Iterator[Tensor]:
        """A section's masters, unless they are its weights, and its states of more than a few elements if they go."""
        section = own.section
        if section.main is not None and not section.main.shares_memory_with(section.weights):
            yield section.main.data
        yield from section.masters.values()
        for piece in self.pieces[own] if not self.is_split else ():
            for value in self.inner.state.get(piece.param, {}).values():
                if isinstance(value, Tensor) and value.nbytes >= SMALLEST_KEPT:
                    yield value

    def show(self, own: Gradients) -> None:
        """A section's masters and states are in memory again: the optimizer steps them."""
        for piece in self.pieces[own]:
            self.inner.param_groups[piece.group]["params"].append(piece.param)
            if piece.param in self._hidden:
                self.inner.state[piece.param] = self._hidden.pop(piece.param)

    def hide(self, own: Gradients) -> None:
        """They go to disk: the optimizer, and whoever looks into it, does not see them."""
        hidden = {id(piece.param) for piece in self.pieces[own]}
        for group in self.inner.param_groups:
            group["params"] = [param for param in group["params"] if id(param) not in hidden]
        for piece in self.pieces[own]:
            if piece.param in self.inner.state:
                self._hidden[piece.param] = self.inner.state.pop(piece.param)

    def every_state(self) -> Iterator[State]:
        """The states of all pieces; large tensors of those on disk have no memory."""
        yield from self.inner.state.values()
        yield from self._hidden.values()

    def group_of(self, param: Tensor) -> Mapping[str, Any]:
        """The options with which a stepped tensor is stepped."""
        number = next(piece.group for piece in chain(*self.pieces.values()) if piece.param is param)
        options: Mapping[str, Any] = self.inner.param_groups[number]
        return options

    def locate(self, own: Gradients, index: int) -> Iterator[tuple[nn.Parameter, Range, Range]]:
        """Where slot `index` lies on this rank: (stepped tensor, range in it, range in the slot), flattened."""
        slot = own.section.layout.slots[index]
        for piece in self.pieces[own]:
            part = slot.span.clip(piece.range)
            if part.numel:
                yield piece.param, part.shift(-piece.range.start), part.shift(-slot.start)

    def restart(self, own: Gradients, kinds: Sequence[int]) -> dict[Range, State]:
        """Cut a section anew, without states: neighbouring parameters are stepped as one if they are of one kind.

        Returns the states that it had, by the range of their piece: whoever wants to may use their memory again.
        """
        before = {piece.range: self.inner.state.pop(piece.param, {}) for piece in self.pieces[own]}
        slots = own.section.layout.slots
        self.pieces[own] = [
            self._part(piece, run, {}) if run != piece.range else piece
            for piece in self._cut(own)
            for _, run in merge_runs((kinds[index], slots[index].padded.clip(piece.range)) for index in piece.slots())
        ]
        self._hand_over(own)
        return before

    def let_go(self) -> None:
        """Give the optimizer back as it came: over the client's tensors, without state."""
        self._behind.close()
        self.residency.close()
        self.inner.state.clear()
        for group, params in zip(self.inner.param_groups, self._given, strict=False):  # groups added since stay
            group["params"] = params
        self.pieces.clear()
        self.whole.clear()
        self.gradients.clear()

    def _carry_over(self, given: Mapping[int, State]) -> None:
        """Give pieces the state that some optimizers (Adagrad) make for their tensors when they are built."""
        for own in self.gradients if given else ():
            for index, member in enumerate(own.section.members):
                state = given.get(id(member.param)) or given.get(id(member.stand_in)) or {}
                for param, held, part in self.locate(own, index):
                    for name, value in state.items():
                        mine = self.inner.state[param]
                        if is_per_element(name, value, member.param.shape):
                            flat = mine.setdefault(name, torch.zeros_like(param.detach())).view(-1)
                            flat[held.start : held.stop] = value.detach().reshape(-1)[part.start : part.stop]
                        else:
                            mine[name] = copy.deepcopy(value)

    def _cut(self, own: Gradients) -> list[Piece]:
        main, layout = own.section.main, own.section.layout
        if main is not None and own.section.granularity is Granularity.ELEMENT:
            ranges = [(group, run.clip(main.range)) for group, run in layout.group_ranges()]
            return [Piece(own, run, group, nn.Parameter(main.at(run))) for group, run in ranges if run.numel]
        if main is None:
            params = self.whole[own].params
        else:
            params = {index: nn.Parameter(main.slot(index)) for index in range(len(layout.slots))}
        return [Piece(own, layout.slots[index].span, layout.slots[index].group, params[index]) for index in params]

    def _set_grads(self, own: Gradients, flags: Sequence[bool]) -> None:
        """Give the pieces whose parameters had a gradient theirs. Collective where whole tensors are exchanged."""
        whole = self.whole[own].take_grads(own.sum.own()) if own in self.whole else {}
        for piece in self.pieces[own]:
            slots = piece.slots()
            if any(flags[index] for index in slots):
                grad = whole[slots[0]] if whole else own.sum.at(piece.range)
                piece.param.grad = grad.view_as(piece.param).to(piece.param.device, piece.param.dtype)

    def _casts(self, own: Gradients) -> Iterator[tuple[Tensor, Tensor]]:
        """The stepped tensors of a section, and where their new values go in the dtype of the weights."""
        target = own.section.cast_target
        if target is not None:
            for piece in self.pieces[own]:
                yield piece.param, target.at(piece.range)

    def _mixes_use(self, own: Gradients, flags: Sequence[bool]) -> bool:
        return any(len({flags[index] for index in piece.slots()}) > 1 for piece in self.pieces[own])

    def _by_use(self, piece: Piece, flags: Sequence[bool]) -> list[Piece]:
        """The piece, or its parts if only some of its parameters had a gradient; they stay apart from then on."""
        slots = piece.slots()
        if len({flags[index] for index in slots}) <= 1:
            return [piece]
        layout = piece.gradients.section.layout
        runs = merge_runs((flags[index], layout.slots[index].padded.clip(piece.range)) for index in slots)
        state = self.inner.state.pop(piece.param, {})
        return [self._part(piece, run, state) for _, run in runs]

    def _part(self, piece: Piece, run: Range, state: State) -> Piece:
        where = slice(run.start - piece.range.start, run.stop - piece.range.start)
        part = Piece(piece.gradients, run, piece.group, nn.Parameter(piece.param.detach()[where]))
        for name, value in state.items():
            is_cut = is_per_element(name, value, piece.param.shape)
            self.inner.state[part.param][name] = value[where].clone() if is_cut else copy.deepcopy(value)
        return part

    def _check_groups(self) -> None:
        if len(self.inner.param_groups) != len(self._given):
            raise OptimizerError(
                f"the optimizer has {len(self.inner.param_groups)} param groups and had {len(self._given)} when "
                "initialize sharded them; add groups before it"
            )

    def _hand_over(self, *used: Gradients) -> None:
        """Let the optimizer step the pieces of the sections in memory: those always there, and `used`."""
        for group in self.inner.param_groups:
            group["params"] = []
        for own in dict.fromkeys([*self.here(), *used]):
            for piece in self.pieces[own]:
                self.inner.param_groups[piece.group]["params"].append(piece.param)


def is_per_element(name: str, value: object, shape: torch.Size) -> TypeGuard[Tensor]:
    """Whether the state `name` of a tensor of `shape` has a number for each of its elements."""
    return isinstance(value, Tensor) and value.shape == shape and (value.dim() > 0 or name != "step")

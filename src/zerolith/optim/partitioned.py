"""A torch optimizer on this rank's part of the masters.

The optimizer object and its param_group dicts stay the client's own; only the tensors in `group["params"]` are
replaced, by flat pieces of the masters (ELEMENT) or by whole tensors (TENSOR).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.comm import Comm, agree
from zerolith.errors import OffloadError, OptimizerError, UsageError
from zerolith.gradients import Gradients
from zerolith.layout import Range
from zerolith.memory import Residency, SwapFile
from zerolith.optim.behind import Behind, alike, can_run_behind, has_hooks, options_of
from zerolith.optim.exchange import WholeTensors
from zerolith.optim.one_pass import OnePass
from zerolith.optim.pieces import Piece, State, cut, is_per_element
from zerolith.optim.split_masters import SplitMasters, can_split
from zerolith.section import Section

SMALLEST_KEPT = 4096  # bytes of a state that is worth a place on disk


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
        self.pieces = {own: cut(own, self._whole_params(own)) for own in gradients}
        self.is_stepping = False
        self._given = [group["params"] for group in inner.param_groups]
        given = {id(param): state for param, state in inner.state.items()}
        inner.state.clear()
        self._carry_over(given)
        self._hidden: dict[nn.Parameter, State] = {}  # of pieces that are not in memory
        self.split_masters = self._split() if splits else None
        self.residency = Residency(self.split_masters or swap, self, goes=self._goes)
        self._own_hook = inner.register_step_pre_hook(self._refuse_outside)
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
        is_watched = has_hooks(self.inner, but=self._own_hook)  # who looks on wants to see gradients and the result
        behind = {own: flags for own, flags in flags_of.items() if own.runs_behind and not is_watched}
        swapped = {own: flags_of[own] for own in self.gradients if self.residency.swaps(own) and own not in behind}
        here = {own: flags_of[own] for own in self.gradients if own not in behind and own not in swapped}
        error = self._cut_by_use(flags_of)  # after which, if there is one, nothing is swapped on this rank
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
        self._behind.settle_all()
        self._is_behind = False
        for own in self.gradients:
            own.section.is_behind = False
        try:
            agree(self.comm, self._behind.take_error(), doing="an update behind the forward", kind=OffloadError)
        except Exception:
            self.residency.abandon()
            raise

    def settle(self) -> None:
        """Wait for updates that run behind. Does not communicate, and leaves what went wrong to `catch_up`."""
        self._behind.settle_all()

    @contextmanager
    def all_shown(self) -> Iterator[None]:
        """Inside, the optimizer has the tensors and states of all sections. Raises UsageError if states are on disk."""
        hidden = [own for own in self.gradients if self.residency.swaps(own)]
        if hidden and self.split_masters is None:
            raise UsageError("optimizer states rest on disk and have no state dict; use engine.save_checkpoint")
        for own in hidden:
            self.show(own)
        try:
            yield
        finally:
            for own in hidden:
                self.hide(own)

    def _split(self) -> SplitMasters:
        for own in self.gradients:
            own.section.is_split = can_split(own.section)
        return SplitMasters(own.section for own in self.gradients if own.section.is_split)

    def _goes(self, own: Gradients) -> bool:
        return own.section.is_split if self.split_masters is not None else own.section.is_offloaded

    def _refuse_outside(self, *_: Any) -> None:
        if not self.is_stepping:
            raise UsageError(
                "this optimizer's step() would see no gradients: call engine.step(), or step() of the optimizer that "
                "initialize returned"
            )

    def _cut_by_use(self, used: Mapping[Gradients, Sequence[bool]]) -> OffloadError | None:
        """Cut pieces of which only some parameters had a gradient; after an error, which is returned, all are here."""
        try:
            for own, flags in used.items():
                if any(piece.mixes(flags) for piece in self.pieces[own]):
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
        self._is_behind = True
        if error is not None:
            self._behind.report(error)
        order, options = [*used][::-1], options_of(self.inner)

        def update(own: Gradients, after: Gradients) -> None:
            params: list[list[Tensor]] = [[] for _ in options]
            for piece in self.pieces[own]:
                params[piece.group].append(piece.param)
            try:
                with self.residency.resident(own):
                    self.residency.prefetch(after)
                    self._step_together({own: used[own]}, alike(self.inner, options, params), grad_factor)
                    own.free()
                    own.section.start_publish().wait()
                own.section.plan.residency.settle()  # here, where a failure is told to all ranks
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
        for piece in self.pieces[own] if self.split_masters is None else ():
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

    def states_here(self) -> Iterator[State]:
        """The states of all pieces that are in memory to stay."""
        yield from self.inner.state.values()
        if self.split_masters is not None:
            yield from self._hidden.values()

    def state_of(self, param: nn.Parameter) -> State:
        """The state of a stepped tensor; large tensors have no memory while they are on disk."""
        state: State = self.inner.state[param] if param in self.inner.state else self._hidden.get(param, {})
        return state

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
        self.pieces[own] = [
            piece.part(run) if run != piece.range else piece
            for piece in cut(own, self._whole_params(own))
            for run in piece.runs(kinds)
        ]
        self._hand_over(own)
        return before

    def let_go(self) -> None:
        """Give the optimizer back as it came: over the client's tensors, without state."""
        self._own_hook.remove()
        self._behind.close()
        self.residency.discard()
        self._hidden.clear()
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

    def _whole_params(self, own: Gradients) -> Mapping[int, nn.Parameter]:
        return self.whole[own].params if own in self.whole else {}

    def _by_use(self, piece: Piece, flags: Sequence[bool]) -> Iterator[Piece]:
        """The piece, or its parts if only some of its parameters had a gradient; they stay apart from then on."""
        if not piece.mixes(flags):
            yield piece
            return
        state = self.inner.state.pop(piece.param, {})
        for run in piece.runs(flags):
            part = piece.part(run)
            for name, value in piece.part_of_state(run, state):
                self.inner.state[part.param][name] = value
            yield part

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

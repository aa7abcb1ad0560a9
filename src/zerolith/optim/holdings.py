"""What of the masters and states this rank's optimizer steps, in which pieces, and where they are.

The optimizer object and its param_group dicts stay the client's own; only the tensors in `group["params"]` are
replaced, by flat pieces of the masters (ELEMENT) or by whole tensors (TENSOR).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.comm import Comm
from zerolith.errors import OptimizerError, UsageError
from zerolith.gradients import Gradients
from zerolith.layout import Range
from zerolith.memory import Residency, SwapFile
from zerolith.optim.exchange import WholeTensors
from zerolith.optim.pieces import Piece, State, cut, is_per_element
from zerolith.optim.split_masters import SplitMasters, can_split

SMALLEST_KEPT = 4096  # bytes of a state that is worth a place on disk


class Holdings:
    """Owner of the pieces of all sections and of their states, which `inner` shows while they are in memory."""

    def __init__(
        self,
        inner: Optimizer,
        gradients: Sequence[Gradients],
        comm: Comm,
        *,
        swap: SwapFile | None,  # where they rest
        splits: bool,  # keep masters as what their weights lack, where that can be
    ) -> None:
        self.inner = inner
        self.comm = comm
        self.gradients = list(gradients)
        self.whole = {own: WholeTensors(own.section, comm) for own in gradients if own.section.main is None}
        self.pieces = {own: cut(own, self._whole_params(own)) for own in gradients}
        self._given = [group["params"] for group in inner.param_groups]
        given = {id(param): state for param, state in inner.state.items()}
        inner.state.clear()
        self._carry_over(given)
        self._hidden: dict[nn.Parameter, State] = {}  # of pieces that are not in memory
        self.split_masters = self._split() if splits else None
        self.residency = Residency(self.split_masters or swap, self, goes=self._goes)

    def here(self) -> list[Gradients]:
        """Sections that are always in memory."""
        return [own for own in self.gradients if not self.residency.swaps(own)]

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

    @contextmanager
    def all_shown(self) -> Iterator[None]:
        """Inside, the optimizer has the tensors and states of all sections. Raises UsageError if states are on disk."""
        hidden = [own for own in self.gradients if self.residency.swaps(own)]
        if hidden and self.split_masters is None:
            raise UsageError("optimizer states rest on disk and have no state dict; use engine.save_checkpoint")
        for own in hidden:
            self.show(own)
        self._hand_over(*hidden)  # in the same order whoever was hidden
        try:
            yield
        finally:
            for own in hidden:
                self.hide(own)

    def let_go(self) -> None:
        """Give the optimizer back as it came: over the client's tensors, without state."""
        self.residency.discard()
        self._hidden.clear()
        self.inner.state.clear()
        for group, params in zip(self.inner.param_groups, self._given, strict=False):  # groups added since stay
            group["params"] = params
        self.pieces.clear()
        self.whole.clear()
        self.gradients.clear()

    def split(self, own: Gradients) -> None:
        """Keep masters that were offloaded until now as what their weights lack, if others are kept so."""
        if self.split_masters is not None and can_split(own.section):
            self.split_masters.take(own.section)
            own.section.is_split = True
            with self.residency.resident(own):
                pass  # from here on they are

    def _split(self) -> SplitMasters:
        for own in self.gradients:
            own.section.is_split = can_split(own.section)
        return SplitMasters(own.section for own in self.gradients if own.section.is_split)

    def _goes(self, own: Gradients) -> bool:
        return own.section.is_split if self.split_masters is not None else own.section.is_offloaded

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
        chosen = {*self.here(), *used}
        for own in filter(chosen.__contains__, self.gradients):
            for piece in self.pieces[own]:
                self.inner.param_groups[piece.group]["params"].append(piece.param)

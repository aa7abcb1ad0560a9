"""Offloaded masters and states that come to the device, when it is known how much of its memory training needs.

[Note: filling] How much activations take is not known when an engine is made. So everything begins in host memory, and
after some of the first steps ranks look at the highest that their device's memory has been at. Then whole sections
come, those of the first units first, as many as have room on every rank. From then on they are sections that were
never offloaded. None goes back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zerolith.config import Config
from zerolith.gradients import Gradients
from zerolith.memory.room import Gauge, gauge_of, how_many_fit
from zerolith.optim.behind import is_known
from zerolith.optim.one_pass import OnePass
from zerolith.optim.partitioned import PartitionedOptimizer
from zerolith.optim.pieces import State
from zerolith.optim.split_masters import could_split
from zerolith.section import Section
from zerolith.unit import Unit

logger = logging.getLogger("zerolith")

LOOKS = (2, 10)  # after so many updates by this engine: the first makes states, and later steps may need more memory
SPARED = 0.1  # of the device's memory, for pieces of it that nobody can use and for what is no tensor


class Filling:
    """Counts steps, looks after some of them, and brings what fits. Every rank calls its methods together."""

    def __init__(self, optimizer: PartitionedOptimizer, gauge: Gauge, *, unit_nbytes: int) -> None:
        self._optimizer = optimizer
        self._gauge = gauge
        self._unit_nbytes = unit_nbytes  # that a unit takes on the device, at most: it may come later than the peak
        self._num_steps = 0

    def stepped(self, catch_up: Callable[[], None]) -> None:
        """A step has updated; `catch_up` waits for updates that run behind. Collective after those in LOOKS."""
        self._num_steps += 1
        if self._num_steps in LOOKS:
            catch_up()
            self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        optimizer = self._optimizer
        offloaded = [own for own in reversed(optimizer.gradients) if own.section.master_device is not None]
        if not offloaded:
            return
        memory = self._gauge.look()
        reserve = int(SPARED * memory.total) + self._unit_nbytes
        sizes = [self._nbytes_there(own) for own in offloaded]
        count = self._least(how_many_fit(sizes, memory, reserve=reserve))
        brought = 0
        for own in offloaded[:count]:
            copies = self._copy(own)
            if not self._least(copies is not None):  # some rank's free memory is in too small pieces
                break
            assert copies is not None, "so it is on every rank"
            move(optimizer, own, copies)
            brought += 1
        if brought and optimizer.comm.rank == 0:
            nbytes = sum(sizes[:brought])
            left = memory.free - memory.rise - nbytes
            message = "%d of %d offloaded sections come to the device: %s of its memory, %s are left at the peak"
            logger.info(message, brought, len(offloaded), _gb(nbytes), _gb(left))

    def _least(self, value: int) -> int:
        """The minimum over ranks. Collective."""
        return -int(self._optimizer.comm.max([-float(value)], name="what fits on the device")[0])

    def _nbytes_there(self, own: Gradients) -> int:
        """What the device will keep of a section's masters and states, and what they are stepped with there."""
        optimizer, section = self._optimizer, own.section
        tensors = [piece.param for piece in optimizer.pieces[own]] if section.main is None else [section.main.data]
        masters = sum(tensor.nbytes for tensor in tensors)
        kept = sum(value.nbytes for _, _, value in _states(optimizer, own))
        if not are_weights(section):
            kept += masters // 2 if optimizer.split_masters is not None and could_split(section) else masters
        if not (isinstance(optimizer.inner, OnePass) and own.rest_dtype is torch.float32):
            kept += masters  # intermediate results of torch's own code, or a copy of the gradient
        if not optimizer.ahead.frees(own) or (are_weights(section) and not section.is_sharded):
            kept += section.layout.shard_numel * own.rest_dtype.itemsize  # its gradient waits for step() there then
        return kept

    def _copy(self, own: Gradients) -> Copies | None:
        """On the device, beside what is there; None if there is no room."""
        section, device = own.section, self._optimizer.comm.device
        main = section.main.data if section.main is not None and not are_weights(section) else None
        states = _states(self._optimizer, own)
        try:
            return Copies(
                main=main.to(device, copy=True) if main is not None else None,
                masters={index: master.to(device, copy=True) for index, master in section.masters.items()},
                states=[(state, key, value.to(device, copy=True)) for state, key, value in states],
            )
        except torch.OutOfMemoryError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """A section's masters and states on its device."""

    main: Tensor | None  # None if there is none, or the weights take its place
    masters: dict[int, Tensor]  # of whole tensors, by index
    states: Sequence[tuple[State, str, Tensor]]  # each with its place


def make_filling(config: Config, units: Sequence[Unit], optimizer: PartitionedOptimizer) -> Filling | None:
    """What fills the device, if the config lets it and there is a device beside the host."""
    offload = config.zero_optimization.offload_optimizer
    if offload.device != "cpu" or not offload.hbm_first or "ratio" in offload.model_fields_set:
        return None
    # Only our kernels give the same bits on host and device, and what others keep outside of their states stays there.
    if not isinstance(optimizer.inner, OnePass) and (config.reproducible or not is_known(optimizer.inner)):
        return None
    gauge = gauge_of(optimizer.comm.device)
    if gauge is None:
        return None
    return Filling(optimizer, gauge, unit_nbytes=max(map(_whole_nbytes, units)))


def move(optimizer: PartitionedOptimizer, own: Gradients, copies: Copies) -> None:
    """Let a section, of which no update is under way, be one that was never offloaded. Does not communicate.

    Parameters that the optimizer steps stay the same objects, and count their writes together with the masters.
    """
    section = own.section
    if copies.main is not None:
        assert section.main is not None, "else nothing was copied"
        section.main.data.data = copies.main
    elif section.main is not None:
        section.main = section.weights.own()
    for index, master in copies.masters.items():
        section.masters[index].data = optimizer.whole[own].params[index].data = master
    for piece in optimizer.pieces[own]:
        if section.main is not None:
            piece.param.data = section.main.at(piece.range)
    for state, key, value in copies.states:
        state[key] = value
    section.is_offloaded = False
    own.runs_behind = False
    optimizer.split(own)
    if not optimizer.may_run_ahead(own):
        optimizer.ahead.eligible.pop(own, None)


def are_weights(section: Section) -> bool:
    """Whether masters that are not offloaded are the weights themselves."""
    main, weights = section.main, section.weights.data
    return main is not None and main.data.dtype == weights.dtype and not section.is_elsewhere


def _states(optimizer: PartitionedOptimizer, own: Gradients) -> list[tuple[State, str, Tensor]]:
    """The tensors of a section's states that follow the masters: all but step counts that torch reads on the host."""
    return [
        (state, key, value)
        for piece in optimizer.pieces[own]
        for state in [optimizer.state_of(piece.param)]
        for key, value in state.items()
        if isinstance(value, Tensor)
        and (key != "step" or any(map(optimizer.inner.param_groups[piece.group].get, ("fused", "capturable"))))
    ]


def _whole_nbytes(unit: Unit) -> int:
    """Of a unit's weights and gradients, whole."""
    sections = [(section, section.grads.data if section.grads is not None else None) for section in unit.sections]
    return sum(
        section.layout.numel
        * (section.weights.data.element_size() + (grads.element_size() if grads is not None else 0))
        for section, grads in sections
    )


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"

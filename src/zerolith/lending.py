"""Lending a device's memory to something else, such as generation, and taking it back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

from torch import Tensor

from zerolith.checkpoints import WEIGHTS, Checkpoints
from zerolith.comm import agree
from zerolith.errors import OffloadError, UsageError
from zerolith.memory.away import Away

OPTIMIZER, MASTERS = "optim_states", "hp_params"
GRADIENTS = ("lp_grads", "contiguous_grad_buffer")
KINDS = (OPTIMIZER, MASTERS, WEIGHTS, *GRADIENTS)


class Lending(Checkpoints):
    """The part of an engine that empties its memory for a while. Every rank calls its methods together."""

    def offload_states(
        self,
        include: Iterable[object] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move states to the host and free their memory on the device, until `reload_states`.

        include: any of "optim_states", "hp_params" (master weights), "lp_params" (the weights that compute),
        "lp_grads" and "contiguous_grad_buffer" (gradients of an unfinished accumulation), or DeepSpeed's enum of
        these; all by default. Masters that are the weights themselves go with the weights; what rests on disk or on
        the host is left there. While anything is away nothing can be trained, saved or loaded; forward works if the
        weights are here, else parameters are NaN. `non_blocking` is taken and does nothing: memory is free when this
        returns.

        Collective. Raises OffloadError on every rank if the host has no room on some; all is back then.
        """
        self._check_ready()
        self._check_here()
        self._catch_up()
        if str(device).split(":")[0] != "cpu":
            raise UsageError(f"offload_states(device={device!r}): states go to the host; leave it 'cpu'")
        names = {str(getattr(each, "value", each)) for each in include} if include is not None else {*KINDS}
        if unknown := sorted(names - {*KINDS}):
            raise UsageError(f"offload_states(include=...): {unknown[0]!r} is none of {', '.join(KINDS)}")
        sharded = self._sharded
        sharded.adopt_edits()
        sharded.release_all()
        sharded.comm.pool.clear()
        self._away = Away(names, pinned=pin_memory and self.device.type == "cuda")
        error: Exception | None = None
        try:
            tensors = [*self._states(names)]
            for section in sharded.sections:
                section.put_away(weights=WEIGHTS in names)
            for own in sharded.gradients:
                own.is_away = not names.isdisjoint(GRADIENTS)
            self._away.send(tensors)
        except OffloadError as caught:
            error = caught
        try:
            agree(sharded.comm, error, doing="offloading states", kind=OffloadError)
        except OffloadError:
            self._bring_back()
            raise

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` has moved; without it, do nothing.

        Collective. Raises OffloadError on every rank if the device has no room on some; call it again when it has.
        """
        self._check_alive()
        if self._away is None:
            return
        error: Exception | None = None
        try:
            self._away.bring_back()
        except (MemoryError, RuntimeError) as caught:
            error = OffloadError(f"{self.device} has no room for the states that were offloaded: {caught}")
        agree(self._sharded.comm, error, doing="reloading states", kind=OffloadError)
        self._bring_back()

    def _bring_back(self) -> None:
        if self._away is not None:
            self._away.bring_back()
            for section in self._sharded.sections:
                section.take_back()
            for own in self._sharded.gradients:
                own.is_away = False
            self._away = None

    def _states(self, names: Set[str]) -> Iterator[Tensor]:
        sharded, optimizer = self._sharded, self._partitioned
        here = {own.section for own in optimizer.here()} if optimizer is not None else set()
        for section in sharded.sections:
            masters = [*section.masters.values()]
            if section.main is not None and not section.main.shares_memory_with(section.weights):
                masters.append(section.main.data)
            if MASTERS in names and optimizer is not None and section.is_split and optimizer.split_masters is not None:
                yield from optimizer.split_masters.of(section).tensors()
            if MASTERS in names and (section in here or section.is_split):
                yield from (tensor for tensor in masters if tensor.device == self.device)
            if WEIGHTS in names and not section.is_elsewhere:
                yield section.weights.data
        if optimizer is not None and OPTIMIZER in names:
            for state in optimizer.states_here():
                yield from (value for value in state.values() if self._is_here(value))
        if not names.isdisjoint(GRADIENTS):
            for own in sharded.gradients:
                yield from own.held()

    def _is_here(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device == self.device and value.dim() > 0

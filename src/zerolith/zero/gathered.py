"""Reading and editing sharded parameters whole."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from zerolith.errors import UsageError
from zerolith.hooks import in_backward
from zerolith.parameter import ShardedParameter
from zerolith.zero.init import Origin
from zerolith.zero.owners import owner_of


class GatheredParameters:
    """Makes parameters whole inside a `with` block; every rank enters and leaves it together.

    params: one parameter or any iterable of them; None and tensors that nobody shards are passed over. Edits made by
    rank `modifier_rank` are kept, on all ranks and in the masters. Without a modifier rank an edit would be lost:
    leaving raises UsageError that names the parameters.
    """

    def __init__(
        self,
        params: Iterable[Tensor | None] | Tensor | None,
        modifier_rank: int | None = None,
        fwd_module: Any = None,  # DeepSpeed's; units know their modules
        enabled: bool = True,
    ) -> None:
        given = [params] if isinstance(params, Tensor) or params is None else list(params)
        odd = next((each for each in given if not (each is None or isinstance(each, Tensor))), None)
        if odd is not None:
            raise UsageError(f"GatheredParameters takes parameters; a {type(odd).__name__} is none")
        distinct = {id(param): param for param in given if param is not None} if enabled else {}
        self.modifier_rank = modifier_rank
        self._owners = [owner for owner in map(owner_of, distinct.values()) if owner is not None]
        origins = [param.origin for param in distinct.values() if isinstance(param, ShardedParameter)]
        self._origins = [origin for origin in origins if isinstance(origin, Origin)]
        self._masters = ExitStack()
        comms = [owner.sharded.comm for owner in self._owners] + [origin.comm for origin in self._origins]
        if modifier_rank is not None and comms and not 0 <= modifier_rank < comms[0].size:
            raise UsageError(f"GatheredParameters: modifier_rank {modifier_rank} is none of {comms[0].size} ranks")

    def __enter__(self) -> None:
        for owner in self._owners:
            owner.refuse_ahead()
        for section in dict.fromkeys(owner.place.section for owner in self._owners):
            if self.modifier_rank is not None and section.is_split and not section.is_sharded:
                self._masters.enter_context(section.resident())  # before the weights are written to
        for owner in self._owners:
            if owner.place.unit.uses == 0 and not in_backward():
                owner.place.unit.release()  # what was written to it before is kept
            owner.place.unit.enter()
            owner.place.unit.gather()
        for origin in self._origins:
            origin.open()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.modifier_rank is not None:
                self._keep_edits(self.modifier_rank)
            elif kind is None:
                self._refuse_edits()
        finally:
            for origin in self._origins:
                origin.close(source=self.modifier_rank)
            for owner in self._owners:
                owner.place.section.drop_edits()  # those to be kept have been, on all ranks alike
                owner.place.unit.leave()
                if owner.place.unit.uses == 0 and not in_backward():
                    owner.place.unit.release()
            self._masters.close()

    @torch.no_grad()
    def _keep_edits(self, source: int) -> None:
        for owner in self._owners:
            place = owner.place
            whole = place.section.whole.slot(place.index)
            owner.sharded.comm.broadcast(whole, source=source, name=f"{place.member.name} edited")
            place.section.adopt_slot(place.index)

    def _refuse_edits(self) -> None:
        sharded = [owner for owner in self._owners if owner.place.section.is_sharded]
        if not sharded:
            return
        edited = [float(owner.place.section.slot_differs(owner.place.index)) for owner in sharded]
        flags = sharded[0].sharded.comm.max(edited, name="edits without a modifier rank")
        names = [owner.place.member.name for owner, flag in zip(sharded, flags, strict=True) if flag]
        if names:
            raise UsageError(
                f"GatheredParameters: {', '.join(names[:5])} edited, but without modifier_rank the edit would be lost; "
                "pass modifier_rank=0 to keep what rank 0 wrote"
            )

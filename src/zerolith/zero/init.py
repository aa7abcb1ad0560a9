"""Building a model that never exists whole on any rank.

Every parameter is sharded soon after the module that made it is finished. When a constructor touches one that is
sharded already (a parent that initialises its children's weights), it is made whole, edited, and sharded again
later; so constructors find what they wrote and keep what they write. At most `OPEN_BYTES` of finished parameters are
whole at a time, plus those of modules whose constructor is still running.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from zerolith.comm import Comm, default_comm, init_distributed
from zerolith.layout import Layout, plan_layout
from zerolith.parameter import ShardedParameter, refuse

OPEN_BYTES = 64 * 2**20


class Origin:
    """One parameter under construction: whole (open) or this rank's shard (closed)."""

    def __init__(self, param: nn.Parameter, comm: Comm) -> None:
        self.param = param
        self.comm = comm
        self.homes: list[tuple[nn.Module, str]] = []
        self.is_open = True
        self.is_finished = False  # the constructor of a module that holds it is over
        self.layout: Layout = plan_layout([param.shape], num_shards=comm.size)
        self.shard: Tensor | None = None  # (layout.shard_numel,) on comm.device; only while closed
        self.stand_in: ShardedParameter | None = None

    def whole(self) -> Tensor:
        """The whole tensor, without opening it. Collective while closed."""
        if self.is_open or self.shard is None:
            return self.param.data
        flat = torch.empty(self.layout.numel, dtype=self.shard.dtype, device=self.shard.device)
        own = self.layout.shard(self.comm.rank)
        flat[own.start : own.stop].copy_(self.shard)
        self.comm.all_gather(flat, name="zero.Init").wait()
        return flat[: self.param.numel()].view(self.param.shape)

    def open(self) -> nn.Parameter:
        """Make it whole and put it into its modules. Collective unless it is open."""
        if not self.is_open:
            self.param.data = self.whole()
            self.is_open = True
            self._install(self.param)
            if self.stand_in is not None:
                self.stand_in.gathered = self.param
        return self.param

    @torch.no_grad()
    def close(self, source: int | None = 0) -> None:
        """Keep this rank's shard of rank `source`'s values (None: of its own) and let the whole go. Collective."""
        if not self.is_open:
            return
        whole = self.param.detach().to(self.comm.device)
        if source is not None:
            self.comm.broadcast(whole, source=source, name="zero.Init")
        flat = torch.zeros(self.layout.shard_numel, dtype=whole.dtype, device=whole.device)
        owned = self.layout.owned(0, self.comm.rank)
        flat[: owned.numel].copy_(whole.reshape(-1)[owned.start : owned.stop])
        self.shard = flat
        # One NaN in the true shape: whoever kept the parameter itself reads NaN and cannot write, instead of
        # reading and writing what nobody keeps.
        self.param.data = torch.full((), torch.nan, dtype=whole.dtype, device=whole.device).expand(whole.shape)
        self.is_open = False
        self._close_stand_in(flat[: owned.numel])

    def _close_stand_in(self, local: Tensor) -> None:
        if self.stand_in is None:
            module, name = self.homes[0]
            fqn = f"{type(module).__name__}.{name}"
            self.stand_in = ShardedParameter(
                self.param.shape, local, self.layout.owned(0, self.comm.rank), fqn=fqn, touch=refuse
            )
            self.stand_in.origin = self
            self.stand_in.requires_grad_(self.param.requires_grad)
        self.stand_in.local = local
        self.stand_in.gathered = None
        self._install(self.stand_in)

    def _install(self, param: Tensor) -> None:
        # A home may have been given another parameter since (tied weights) or none at all.
        self.homes = [home for home in self.homes if self._is_at(*home)]
        for module, name in self.homes:
            module._parameters[name] = param  # type: ignore[assignment]  # a stand-in counts as a parameter

    def _is_at(self, module: nn.Module, name: str) -> bool:
        held = module._parameters.get(name)
        return held is not None and id(held) in (id(self.param), id(self.stand_in))


class Init:
    """`with zerolith.zero.Init():` shards every parameter made inside over all ranks, as it is made.

    Collective: every rank builds the same model. Rank 0's values are kept, as `initialize` keeps them elsewhere.
    Parameters are made on the CPU, by the same random numbers as without this context, and their shards move to
    the rank's device. `module` shards an existing module at once; `dtype` is the dtype of new floating-point
    parameters; the other arguments are DeepSpeed's and have no effect.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        **_: Any,  # DeepSpeed's further arguments: groups, devices and quantization
    ) -> None:
        self.enabled = enabled
        self.dtype = dtype
        self._open: list[Origin] = []
        self._by_param: dict[int, Origin] = {}
        self._handles: list[Any] = []
        if module is not None and enabled:
            with self:
                for inner in module.modules():
                    for name, param in list(inner._parameters.items()):
                        if param is not None:
                            inner.register_parameter(name, param)

    def __enter__(self) -> Init:
        if self.enabled:
            init_distributed()
            self._comm = default_comm()
            self._handles = [
                register_module_parameter_registration_hook(self._on_parameter),
                register_module_module_registration_hook(self._on_module),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if kind is None:
            for origin in self._open:
                origin.close()
        for origin in self._by_param.values():
            if origin.stand_in is not None:
                origin.stand_in.touch = refuse
        self._open = []

    def _on_parameter(self, module: nn.Module, name: str, param: Any) -> Any:
        if param is None:
            return None
        origin = self._by_param.get(id(param))
        if isinstance(param, ShardedParameter) and isinstance(param.origin, Origin):
            origin = param.origin
        if origin is None:
            if self.dtype is not None and param.is_floating_point():
                param = nn.Parameter(param.detach().to(self.dtype), requires_grad=param.requires_grad)
            origin = self._by_param[id(param)] = Origin(param, self._comm)
            self._open.append(origin)
        origin.homes.append((module, name))
        return param

    def _on_module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        for inner in child.modules():
            for param in inner._parameters.values():
                origin = self._by_param.get(id(param))
                if origin is not None:
                    origin.is_finished = True
        self._close_oldest()

    def _close_oldest(self, but: Sequence[object] = ()) -> None:
        """Shard finished parameters, those opened longest ago first, until few enough bytes are whole."""
        finished = [origin for origin in self._open if origin.is_finished and origin not in but]
        excess = sum(origin.param.nbytes for origin in finished) - OPEN_BYTES
        for origin in finished:
            if excess <= 0:
                break
            excess -= origin.param.nbytes
            origin.close()
            self._open.remove(origin)
            if origin.stand_in is not None:
                origin.stand_in.touch = self._touch

    def _touch(self, stand_in: ShardedParameter, together: Sequence[ShardedParameter]) -> Tensor:
        origin = stand_in.origin
        if not isinstance(origin, Origin):
            return refuse(stand_in)
        whole = origin.open()
        self._open.append(origin)
        self._close_oldest(but=[other.origin for other in together])
        return whole

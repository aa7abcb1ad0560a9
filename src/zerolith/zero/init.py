"""Building a model that never exists whole on any rank.

Every parameter is sharded soon after the module that made it is finished. When a constructor touches one that is
sharded already (a parent that initialises its children's weights), it is made whole, edited, and sharded again
later; so constructors find what they wrote and keep what they write. At most `OPEN_BYTES` of finished parameters are
whole at a time, plus those of modules whose constructor is still running.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from zerolith.comm import Comm, default_comm, init_distributed
from zerolith.layout import Layout, plan_layout
from zerolith.parameter import ShardedParameter, absent, refuse

OPEN_BYTES = 64 * 2**20
_active: list[Init] = []  # the outermost context that is open, if there is one


class Origin:
    """One parameter under construction: whole (open) or this rank's shard (closed), which its stand-in then holds."""

    def __init__(self, param: nn.Parameter, comm: Comm) -> None:
        self.param = param
        self.comm = comm
        self.homes: list[tuple[nn.Module, str]] = []
        self.is_finished = False  # the constructor of a module that holds it is over
        self.layout: Layout = plan_layout([param.shape], num_shards=comm.size)
        self.stand_in: ShardedParameter | None = None  # from the first close() on; `gathered` while open

    def whole(self) -> Tensor:
        """The whole tensor, without opening it. Collective while closed."""
        if self.stand_in is None or self.stand_in.gathered is not None:
            return self.param.data
        owned = self.stand_in.owned
        flat = self.stand_in.local.new_zeros(self.layout.numel)
        flat[owned.start : owned.stop].copy_(self.stand_in.local)
        self.comm.all_gather(flat, name="zero.Init").wait()
        return flat[: self.param.numel()].view(self.param.shape)

    def open(self) -> nn.Parameter:
        """Make it whole and put it into its modules. Collective unless it is open."""
        if self.stand_in is not None and self.stand_in.gathered is None:
            self.param.data = self.whole()
            self.stand_in.gathered = self.param
            self._install(self.param)
        return self.param

    @torch.no_grad()
    def close(self, source: int | None = 0) -> ShardedParameter:
        """Keep this rank's shard of rank `source`'s values (None: of its own) and let the whole go. Collective."""
        if self.stand_in is not None and self.stand_in.gathered is None:
            return self.stand_in
        whole = self.param.detach().to(self.comm.device).contiguous()
        if source is not None:
            self.comm.broadcast(whole, source=source, name="zero.Init")
        owned = self.layout.owned(0, self.comm.rank)
        local = whole.reshape(-1)[owned.start : owned.stop].clone()
        self.param.data = absent(whole)  # whoever kept the parameter itself cannot write what nobody keeps
        if self.stand_in is None:
            module, name = self.homes[0]
            fqn = f"{type(module).__name__}.{name}"
            self.stand_in = ShardedParameter(whole.shape, local, owned, fqn=fqn, touch=refuse)
            self.stand_in.origin = self
            self.stand_in.requires_grad_(self.param.requires_grad)
        self.stand_in.local, self.stand_in.gathered = local, None
        self._install(self.stand_in)
        return self.stand_in

    def _install(self, param: Tensor) -> None:
        # A home may have been given another parameter since (tied weights) or none at all.
        ours = (id(self.param), id(self.stand_in))
        self.homes = [(module, name) for module, name in self.homes if id(module._parameters.get(name)) in ours]
        for module, name in self.homes:
            module._parameters[name] = param  # type: ignore[assignment]  # a stand-in counts as a parameter


class Init:
    """`with zerolith.zero.Init():` shards every parameter made inside over all ranks, as it is made.

    Collective: every rank builds the same model. Rank 0's values are kept, as `initialize` keeps them elsewhere.
    Parameters are made on the CPU, by the same random numbers as without this context, and their shards move to
    the rank's device. `module` shards an existing module at once; `dtype` is the dtype of new floating-point
    parameters; the other arguments are DeepSpeed's and have no effect. Of contexts within each other (a library may
    enter one, too) the outermost does the work, with the `dtype` of the innermost that has one.
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
        self._outer: Init | None = None
        if module is not None and enabled:
            with self:
                for inner in module.modules():
                    for name, param in list(inner._parameters.items()):
                        inner.register_parameter(name, param)

    def __enter__(self) -> Init:
        if not self.enabled:
            return self
        if _active:
            self._outer, self._outer_dtype = _active[0], _active[0].dtype
            _active[0].dtype = self.dtype or _active[0].dtype
        else:
            init_distributed()
            self._comm = default_comm()
            self._handles = [
                register_module_parameter_registration_hook(self._on_parameter),
                register_module_module_registration_hook(self._on_module),
            ]
            _active.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._outer is not None:
            self._outer.dtype, self._outer = self._outer_dtype, None
            return
        _active[:] = [each for each in _active if each is not self]
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
        for param in child.parameters():
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
            origin.close().touch = self._touch
            self._open.remove(origin)

    def _touch(self, stand_in: ShardedParameter, together: Sequence[ShardedParameter]) -> Tensor:
        origin = stand_in.origin
        if not isinstance(origin, Origin):
            return refuse(stand_in)
        whole = origin.open()
        self._open.append(origin)
        self._close_oldest(but=[other.origin for other in together])
        return whole

"""A parameter at rest at stage 3: its true shape, and the flat range that this rank holds.

[Note: stand-ins] While a unit is at rest, its modules hold a ShardedParameter in place of each nn.Parameter.
Gathering puts the same nn.Parameter objects back. So code that reads `module.weight` at rest meets an object that
tells shape and dtype, refuses to compute (the freed storage of the real one would crash the process), and
that torch.distributed.checkpoint can save and load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from zerolith.errors import ShardedAccessError, UsageError
from zerolith.layout import Box, Range, boxes

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

Touch = Callable[["ShardedParameter", Sequence["ShardedParameter"]], Tensor]


def refuse(param: ShardedParameter, together: Sequence[ShardedParameter] = ()) -> Tensor:
    """What touching a sharded parameter does outside a forward: raise, and say what to do."""
    raise ShardedAccessError(
        f"{param.fqn!r} is sharded over the data-parallel ranks and cannot be computed with here. Read or edit it "
        f"inside `with zerolith.zero.GatheredParameters([param], modifier_rank=0):`, on every rank."
    )


class ShardedParameter(torch.Tensor):
    """Stands for a parameter of `shape` of which this rank holds elements [owned.start, owned.stop), flattened.

    local: (owned.numel,) the held elements, a view of the unit's buffer. `touch` is asked for the whole tensor
    when an operation needs it; by default it raises ShardedAccessError.
    """

    fqn: str
    _local: Tensor
    owned: Range
    touch: Touch
    settle: Callable[[], None]  # waits until the elements are those of the last step
    gathered: Tensor | None  # the whole parameter while its unit is gathered: then operations go to it
    origin: object  # what built it, while it belongs to no engine yet

    @staticmethod
    def __new__(
        cls, shape: torch.Size, local: Tensor, owned: Range, *, fqn: str, touch: Touch, requires_grad: bool = False
    ) -> ShardedParameter:
        stand_in = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device, requires_grad=requires_grad
        )
        stand_in._is_param = True  # what nn.Parameter's isinstance test looks at
        stand_in.fqn, stand_in._local, stand_in.owned, stand_in.touch = fqn, local, owned, touch
        stand_in.gathered = stand_in.origin = None
        stand_in.settle = lambda: None
        return stand_in

    @property
    def local(self) -> Tensor:
        """Raises ShardedAccessError while the elements are not in memory: to read them would crash the process."""
        self.settle()
        if self._local.numel() and not self._local.untyped_storage().nbytes():
            raise ShardedAccessError(
                f"{self.fqn!r} is not in memory, because weights are offloaded: read or edit it inside "
                "`with zerolith.zero.GatheredParameters(...)`, and save it with engine.save_checkpoint"
            )
        return self._local

    @local.setter
    def local(self, local: Tensor) -> None:
        self._local = local

    @property
    def present(self) -> Tensor:
        """The whole parameter if it is gathered, else this."""
        return self if self.gathered is None else self.gathered

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped in torch
        return (
            f"ShardedParameter({self.fqn!r}, shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"this rank holds [{self.owned.start}:{self.owned.stop}])"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedParameter:
        local = self.local.detach().clone()  # not a deep copy: that would take the unit's whole buffer along
        return ShardedParameter(
            self.shape, local, self.owned, fqn=self.fqn, touch=refuse, requires_grad=self.requires_grad
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(cls, lambda param: param.present, (args, kwargs))
        if func is torch.Tensor.copy_:
            return _copy_into(*args, **kwargs)
        together = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        args, kwargs = pytree.tree_map_only(cls, lambda param: param.touch(param, together), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as an instance method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            source = args[0]
            view = cls(source.shape, source._local, source.owned, fqn=source.fqn, touch=source.touch)
            view.settle = source.settle
            return view
        return refuse(next(arg for arg in pytree.tree_leaves((args, kwargs)) if isinstance(arg, cls)))

    # torch.distributed.checkpoint's protocol for tensors that know their own chunks (private: torch 2.11 to 2.13).

    def _boxes(self) -> Iterator[tuple[Box, Tensor]]:
        if not self.numel():  # every rank tells of it; who writes it is the planner's choice
            yield Box((0,) * self.ndim, tuple(self.shape), 0), self.local.view(self.shape)
        for box in boxes(tuple(self.shape), self.owned):
            numel = torch.Size(box.sizes).numel()
            yield box, self.local.narrow(0, box.start - self.owned.start, numel).view(box.sizes)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self._boxes()]

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        # Imported at the first save: torch.distributed.checkpoint takes longer to import than all of zerolith.
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets), index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(box), properties=properties, size=self.shape),
            )
            for index, (box, _) in enumerate(self._boxes())
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, part in self._boxes():
            if torch.Size(box.offsets) == index.offset:
                return part.detach()
        raise KeyError(f"{index} is not a chunk of {self!r} on this rank")


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


def _copy_into(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`target.copy_(source)`: each rank takes its own range, so loading a state dict needs no communication."""
    if not isinstance(target, ShardedParameter):
        whole = source.touch(source, (source,)) if isinstance(source, ShardedParameter) else source
        return target.copy_(whole, non_blocking)
    if source.shape != target.shape:
        raise ShardedAccessError(
            f"{target.fqn!r} has shape {tuple(target.shape)}; a tensor of shape {tuple(source.shape)} does not fit"
        )
    if not isinstance(source, ShardedParameter):
        part = source.detach().reshape(-1)[target.owned.start : target.owned.stop]
    elif source.owned == target.owned:
        part = source.local
    else:
        raise ShardedAccessError(f"{target.fqn!r}: source and target are sharded differently")
    with torch.no_grad():
        target.local.copy_(part)
    return target


_METADATA_METHODS = """
    size dim numel nelement element_size stride is_floating_point is_complex is_contiguous requires_grad_ ndimension
    __hash__ __repr__ __len__ is_shared is_pinned get_device type dim_order __format__ is_signed
"""
_METADATA_PROPERTIES = """
    shape dtype device requires_grad is_leaf grad layout ndim is_cuda is_cpu is_meta is_sparse is_quantized is_mkldnn
    is_mps is_xpu is_nested itemsize nbytes names _version grad_fn retains_grad is_sparse_csr is_mtia is_ipu is_hpu
    is_maia is_xla is_vulkan _backward_hooks _is_param grad_dtype
"""
# What a stand-in answers itself: what asks about the tensor rather than for its values, as far as this torch has it.
_ANSWERED: set[Any] = {getattr(torch.Tensor, name, None) for name in f"detach __deepcopy__ {_METADATA_METHODS}".split()}
_ANSWERED |= {
    getattr(getattr(torch.Tensor, name, None), accessor, None)
    for name in _METADATA_PROPERTIES.split()
    for accessor in ("__get__", "__set__")
}


def absent(view: Tensor) -> Tensor:
    """A tensor of `view`'s shape for a parameter whose memory is freed: reading that would crash the process.

    Code that kept the parameter itself, not looking it up in its module, computes NaN.
    """
    value = float("nan") if view.is_floating_point() else 0
    return torch.full((), value, dtype=view.dtype, device=view.device).expand(view.shape)


def refuse_away() -> NoReturn:
    """Raises UsageError: what is asked for has been lent."""
    raise UsageError("states are offloaded; call engine.reload_states() before")

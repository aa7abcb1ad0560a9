"""The compiled library: found beside this file, loaded at the first use, never built here.

[Note: aliasing] The arrays of a call must not overlap; `arrays.check` sees to it. They need no alignment, and any
length is right. The library keeps nothing between calls: no threads, no memory, no settings. So calls may come from
several threads at once, and a process may fork between calls; a fork during a call of another thread is safe too.
The arrays must stay alive until a call returns, which ctypes does by holding the arguments.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from zerolith.errors import UsageError
from zerolith.kernels.arrays import FORMATS, Arrays
from zerolith.kernels.recipe import Recipe

logger = logging.getLogger("zerolith")

PATH = Path(__file__).with_name("libzerolith_kernels.so")
ABI = 2  # as in csrc/library.cpp; raised when the C interface or the recipe changes
INSTRUCTION_SETS = ("generic", "neon", "avx2", "avx512")  # by their codes, the best last
FORMAT = {dtype: code for code, dtype in enumerate(FORMATS)}
NO_OUT, SPLIT = 3, 4  # targets beside FORMATS; see csrc/tier.h
STREAM_FROM = 1 << 20  # elements from which results are written past the caches: they would not stay there


REALS = (  # the fields of Scalars in csrc/tier.h, in its order
    *("grad_factor", "weight_decay", "decay", "first_keep", "first_gain", "second_keep", "second_gain", "eps", "rate"),
)
FLAGS = ("is_first", "is_nesterov")


class _Scalars(Structure):
    _fields_ = (*((name, c_float) for name in REALS), *((name, c_int32) for name in FLAGS))


class Streams(Structure):
    """Addresses of the arrays of an update."""

    _fields_ = tuple((name, c_void_p) for name in ("grad", "master", "remainder", "first", "second", "out"))


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "zl_abi": (c_int32, ()),
    "zl_can_run": (c_int32, (c_int32,)),
    "zl_update": (
        None,
        (c_int32, c_int32, c_int32, POINTER(_Scalars), POINTER(Streams), c_int32, c_int32, c_int32, c_int64),
    ),
    "zl_square_sums": (None, (c_int32, c_int32, c_void_p, c_int32, c_int64, c_void_p)),
    "zl_add": (
        None,
        (c_int32, c_int32, c_void_p, c_int32, POINTER(c_void_p), c_int32, c_int32, c_int64, c_void_p, c_int32),
    ),
    "zl_split": (None, (c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int64)),
    "zl_join": (None, (c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_int64)),
    "zl_copy": (None, (c_int32, c_int32, POINTER(Streams), c_int32, c_int32, c_int64)),
}


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of one instruction set."""

    handle: ctypes.CDLL
    instruction_set: str

    @property
    def tier(self) -> int:
        return INSTRUCTION_SETS.index(self.instruction_set)

    def update(self, recipe: Recipe, arrays: Arrays, *, threads: int) -> None:
        """One step on whole arrays."""
        scalars = _Scalars(*(getattr(recipe, name) for name in REALS + FLAGS))
        states = (*arrays.states, None, None)
        streams = Streams(
            *map(_address, (arrays.grad, arrays.master, arrays.remainder, states[0], states[1], arrays.out))
        )
        if arrays.remainder is not None:
            target = SPLIT
        else:
            target = NO_OUT if arrays.out is None else FORMAT[arrays.out.dtype]
        numel = arrays.master.numel()
        self.handle.zl_update(
            self.tier, threads, recipe.kind, scalars, streams, FORMAT[arrays.grad.dtype], target,
            numel >= STREAM_FROM, numel,
        )  # fmt: skip

    def square_sums(self, values: Tensor, blocks: Tensor, *, threads: int) -> None:
        """The sums of squares of the blocks of `values`."""
        self.handle.zl_square_sums(
            self.tier, threads, values.data_ptr(), FORMAT[values.dtype], values.numel(), blocks.data_ptr()
        )

    def add(self, target: Tensor, terms: Sequence[Tensor], blocks: Tensor | None, *, fresh: bool, threads: int) -> None:
        """The sum of `terms`, or of `target` and them, to `target`; the square sums of its blocks to `blocks`."""
        addresses = (c_void_p * len(terms))(*(term.data_ptr() for term in terms))
        numel = target.numel()
        self.handle.zl_add(
            self.tier, threads, target.data_ptr(), fresh, addresses, len(terms), FORMAT[terms[0].dtype], numel,
            _address(blocks), fresh and numel >= STREAM_FROM,
        )  # fmt: skip

    def split(self, master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
        """Write both halves of `master`."""
        pointers = (master.data_ptr(), weight.data_ptr(), remainder.data_ptr())
        self.handle.zl_split(self.tier, threads, *pointers, master.numel())

    def join(self, master: Tensor, weight: Tensor, remainder: Tensor, *, threads: int) -> None:
        """Write `master` from both halves."""
        pointers = (master.data_ptr(), weight.data_ptr(), remainder.data_ptr())
        self.handle.zl_join(self.tier, threads, *pointers, master.numel())

    def copy(self, arrays: Arrays, *, threads: int) -> None:
        """For benchmarks: read and write what Adam does, and compute nothing. `out` has the gradient's dtype.

        Master and states change places, so three calls leave them as they were; `out` becomes the gradient.
        """
        streams = Streams(*map(_address, (arrays.grad, arrays.master, None, *arrays.states, arrays.out)))
        numel = arrays.master.numel()
        self.handle.zl_copy(self.tier, threads, streams, FORMAT[arrays.grad.dtype], numel >= STREAM_FROM, numel)


def load(path: Path = PATH, *, instruction_set: str | None = None) -> Library:
    """The library in the file `path`, for the best instruction set of this processor, or for the named one.

    Raises OSError where there is none or it is another version's, UsageError if it has not that instruction set or
    the processor has not.
    """
    handle = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(handle, name)
        except AttributeError as error:
            raise OSError(f"{path} is another version's: it has no {name}") from error
        function.restype, function.argtypes = result, arguments
    if handle.zl_abi() != ABI:
        raise OSError(f"{path} is another version's: {handle.zl_abi()} instead of {ABI}")
    usable = [name for code, name in enumerate(INSTRUCTION_SETS) if handle.zl_can_run(code)]
    if instruction_set is not None and instruction_set not in usable:
        raise UsageError(f"instruction set {instruction_set!r}: this processor and library have {', '.join(usable)}")
    return Library(handle, instruction_set or usable[-1])


@functools.cache
def library() -> Library | None:
    """The library of this installation; None, and one notice, where it has none."""
    try:
        return load()
    except OSError as error:
        logger.warning(
            "zerolith.kernels: no compiled library, so torch operations do its work: the same results, several times "
            "slower. Installing zerolith from source with a C++ compiler (g++ or clang++) at hand builds it. (%s)",
            error,
        )
        return None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

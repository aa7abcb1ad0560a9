"""Fused native passes behind plain functions: optimizer steps, gradient sums, split masters.

Nothing here communicates, and nothing is compiled at run time. On CUDA tensors Triton does the work, if there is one.
"""

from zerolith.kernels.arrays import FORMATS as FORMATS, SplitMaster as SplitMaster
from zerolith.kernels.native import library as _library
from zerolith.kernels.split_master import join as join, split as split
from zerolith.kernels.sums import add as add, square_sums as square_sums
from zerolith.kernels.updates import adagrad as adagrad, adamw as adamw, lion as lion, sgd as sgd


def is_compiled() -> bool:
    """Whether the compiled library serves on the CPU; if not, torch operations do, with the same results."""
    return _library() is not None

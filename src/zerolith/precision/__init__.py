"""Number formats: which dtype computes, travels and accumulates, and the loss scale that fp16 needs."""

from zerolith.precision.policy import Precision
from zerolith.precision.scaler import LossScaler

__all__ = ["LossScaler", "Precision"]

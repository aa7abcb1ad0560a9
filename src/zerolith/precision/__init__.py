"""Number formats: which dtype computes, travels and accumulates, and the loss scale that fp16 needs."""

from zerolith.precision.policy import Precision as Precision
from zerolith.precision.scaler import LossScaler as LossScaler

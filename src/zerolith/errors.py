"""Every error that zerolith raises, as one tree.

    ZerolithError
    ├── ConfigError              the JSON config says something wrong or unsupported (also a ValueError)
    ├── UsageError               a call that makes no sense now: step() without backward(), ... (also a RuntimeError)
    │   ├── ShardedAccessError   computing with a parameter of which this rank holds only a shard
    │   └── PhaseError           a unit was asked for an illegal move; engine.reset() brings it back to rest
    ├── OptimizerError           an optimizer that cannot be partitioned, or whose groups are wrong
    ├── ScaleError               the dynamic loss scale cannot get any lower
    ├── CheckpointError          a checkpoint cannot be written or read: disk full, no such tag, not this model's, ...
    │   ├── CheckpointDamagedError   what lies on disk is not what was written
    │   └── CheckpointLockedError    another job writes to the same folder
    ├── OffloadError             what lies in host memory or on disk cannot be put there or brought back
    ├── IntegrityError           values changed by themselves: ranks differ in what must be equal, or memory is broken
    └── DistributedError         the ranks do not agree, or one is gone
        ├── HandshakeError       config, versions or parameters differ between ranks at start-up
        ├── CollectiveMismatchError  ranks issued different collectives
        └── PeerLostError        a collective failed because another rank died or timed out

Messages say what is wrong, where (config path, parameter name, rank) and what to do.
"""

from __future__ import annotations


class ZerolithError(Exception):
    """Base of every error of this library."""


class ConfigError(ZerolithError, ValueError):
    """The configuration is wrong or asks for something that is not supported."""


class UsageError(ZerolithError, RuntimeError):
    """A call that makes no sense in the present state."""


class ShardedAccessError(UsageError):
    """A computation touched a parameter of which this rank holds only a shard."""


class PhaseError(UsageError):
    """A unit was asked for a move that its phase does not allow."""


class OptimizerError(ZerolithError, ValueError):
    """An optimizer cannot be partitioned, or its parameter groups are wrong."""


class ScaleError(ZerolithError, RuntimeError):
    """The dynamic loss scale is at its minimum and gradients still overflow."""


class CheckpointError(ZerolithError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointDamagedError(CheckpointError):
    """What lies on disk is not what was written: a flipped bit, a torn or missing file."""


class CheckpointLockedError(CheckpointError):
    """Another job writes to the same folder."""


class OffloadError(ZerolithError, RuntimeError):
    """What was to be kept outside the device cannot be put there or brought back."""


class IntegrityError(ZerolithError, RuntimeError):
    """Values that must be equal are not: on different ranks, or of one tensor at different times."""


class DistributedError(ZerolithError, RuntimeError):
    """The ranks do not agree, or one of them is gone."""


class HandshakeError(DistributedError):
    """Config, versions or parameters differ between ranks at start-up."""


class CollectiveMismatchError(DistributedError):
    """Ranks issued different collectives, so their results cannot be trusted."""


class PeerLostError(DistributedError):
    """A collective failed because another rank died or did not answer in time."""

"""Checkpoints of DeepSpeed, read without DeepSpeed."""

from zerolith.checkpoint.deepspeed.checkpoint import (
    DeepSpeedCheckpoint as DeepSpeedCheckpoint,
    ForeignParameter as ForeignParameter,
    ParamGroup as ParamGroup,
)
from zerolith.checkpoint.deepspeed.read import read_deepspeed as read_deepspeed
from zerolith.checkpoint.deepspeed.records import (
    StoredTensor as StoredTensor,
    Symbol as Symbol,
    Unknown as Unknown,
)
from zerolith.checkpoint.deepspeed.unpickle import read_torch_file as read_torch_file

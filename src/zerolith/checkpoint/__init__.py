"""Checkpoints that cannot be lost: atomic, verified, elastic and without pickle.

A rank's content goes into a safetensors file of its own; a manifest that names all files, with a checksum for each
chunk, makes them a checkpoint in one rename. docs/checkpoint-format.md says how they look on disk.

For users there are `get_fp32_state_dict`, `load_model`, `export` and `import_deepspeed`; an engine saves and loads by
itself.
"""

from zerolith.checkpoint.content import Content as Content, Part as Part
from zerolith.checkpoint.disk import Disk as Disk
from zerolith.checkpoint.export import export as export
from zerolith.checkpoint.folder import (
    Kept as Kept,
    check_tag as check_tag,
    find as find,
    probe as probe,
    tag_folder as tag_folder,
)
from zerolith.checkpoint.importing import import_deepspeed as import_deepspeed
from zerolith.checkpoint.plain_model import get_fp32_state_dict as get_fp32_state_dict, load_model as load_model
from zerolith.checkpoint.preemption import Preemption as Preemption
from zerolith.checkpoint.reader import Reader as Reader
from zerolith.checkpoint.run import (
    Run as Run,
    Wants as Wants,
    agree_on_checkpoint as agree_on_checkpoint,
    check as check,
    collect as collect,
    restore as restore,
)
from zerolith.checkpoint.saver import TIMEOUT as TIMEOUT, Job as Job, Saver as Saver
from zerolith.checkpoint.training_state import Sharded as Sharded, digest as digest
from zerolith.checkpoint.versions import libraries as libraries
from zerolith.checkpoint.weights import save_weights as save_weights, whole_state_dict as whole_state_dict

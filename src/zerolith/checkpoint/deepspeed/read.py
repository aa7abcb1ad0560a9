"""Read a checkpoint that DeepSpeed wrote, without DeepSpeed and without running anything that is in its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zerolith.checkpoint.deepspeed.checkpoint import DeepSpeedCheckpoint
from zerolith.checkpoint.deepspeed.files import CheckpointFiles, find_files, find_home
from zerolith.checkpoint.deepspeed.model_state import ModelState, read_model_state
from zerolith.checkpoint.deepspeed.optimizer_state import Restored
from zerolith.checkpoint.deepspeed.partitioned import read_partitioned
from zerolith.checkpoint.deepspeed.plain import as_json, load_tensors
from zerolith.checkpoint.deepspeed.replicated import read_replicated
from zerolith.checkpoint.deepspeed.universal import read_universal
from zerolith.errors import CheckpointDamagedError


def read_deepspeed(
    folder: Path | str, tag: str | None = None, *, group_names: Sequence[Sequence[str]] | None = None
) -> DeepSpeedCheckpoint:
    """The checkpoint `tag` in `folder`, or the newest one: of ZeRO stage 0 to 3, any number of ranks, or universal.

    Opens every file, but reads tensors only when they are asked for. `group_names` is for stage 0, whose files name
    no parameters: those of each of the optimizer's param groups, in order, if shapes and values do not tell; an empty
    sequence leaves the optimizer out. Raises CheckpointError for what cannot be read (tensor- and pipeline-parallel
    ranks, experts, states on NVMe), CheckpointDamagedError for what is missing, cut off or made to do harm.
    """
    files = find_files(find_home(Path(folder), tag))
    first, *others = (read_model_state(path) for path in files.weights)
    restored = _restore(files, first, others, group_names)
    buffers = {name: tensor for name, tensor in first.module.items() if name in first.buffer_names}
    return DeepSpeedCheckpoint(
        home=files.home,
        files=(*files.weights, *restored.files),
        step=first.step,
        samples=first.samples,
        skipped_steps=first.skipped_steps,
        zero_stage=restored.zero_stage,
        num_ranks=first.num_ranks,
        parameters=restored.parameters,
        buffers=load_tensors(buffers, where=first.path),
        aliases=first.aliases,
        param_groups=restored.param_groups,
        scheduler=as_json(first.scheduler),
        loss_scale=restored.loss_scale,
        client_state=load_tensors(first.client, where=first.path),
    )


def _restore(
    files: CheckpointFiles, first: ModelState, others: list[ModelState], group_names: Sequence[Sequence[str]] | None
) -> Restored:
    if files.universal is not None:
        return read_universal(first, others, files.universal)
    if files.optimizer:
        return read_partitioned(first, others, files.optimizer)
    if first.groups is not None or others or files.weights[0].name.startswith("zero_"):
        raise CheckpointDamagedError(
            f"{files.home}: the optimizer's files zero_pp_rank_<rank>_mp_rank_00_optim_states.pt are missing"
        )
    return read_replicated(first, group_names)

"""The rule of the three batch numbers: global batch = micro-batch * accumulation steps * ranks."""

from zerolith.config.schema import Config
from zerolith.errors import ConfigError

_RULE = "train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * ranks"


def resolve_batch(config: Config, dp_world_size: int) -> Config:
    """A copy of `config` with all three batch numbers set for this many data-parallel ranks.

    Two numbers give the third; one batch size alone means one accumulation step. Raises ConfigError where
    no batch size is given or the numbers do not multiply out.
    """
    if dp_world_size < 1:
        raise ConfigError(f"dp_world_size must be a positive integer, not {dp_world_size}")
    total = config.train_batch_size
    micro = config.train_micro_batch_size_per_gpu
    steps = config.gradient_accumulation_steps
    if micro is None:
        if total is None:
            raise ConfigError(
                f"neither train_batch_size nor train_micro_batch_size_per_gpu is set; set one of them ({_RULE})"
            )
        steps = steps or 1
        micro = total // (steps * dp_world_size)
        piece = steps * dp_world_size
    else:
        piece = micro * (steps or 1) * dp_world_size
        steps = steps or (total // piece if total else 1)
    if total is None:
        total = micro * steps * dp_world_size
    if total != micro * steps * dp_world_size:
        raise ConfigError(_mismatch(config, dp_world_size, total=total, piece=piece))
    return config.model_copy(
        update={
            "train_batch_size": total,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": steps,
        }
    )


def _mismatch(config: Config, dp_world_size: int, *, total: int, piece: int) -> str:
    micro, steps = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    if micro is not None and steps is not None:
        fixes = [f"train_batch_size {piece}"]
        if total % (micro * dp_world_size) == 0:
            fixes.append(f"gradient_accumulation_steps {total // (micro * dp_world_size)}")
        if total % (steps * dp_world_size) == 0:
            fixes.append(f"train_micro_batch_size_per_gpu {total // (steps * dp_world_size)}")
    else:
        below = total // piece * piece
        fixes = [f"train_batch_size {fix}" for fix in (below, below + piece) if fix]
    return (
        f"train_batch_size {total} does not split into train_micro_batch_size_per_gpu {_given(micro)} * "
        f"gradient_accumulation_steps {_given(steps)} * {dp_world_size} ranks; "
        f"nearest fixes: {' or '.join(fixes)} (rule: {_RULE})"
    )


def _given(number: int | None) -> str:
    return "(not set)" if number is None else str(number)

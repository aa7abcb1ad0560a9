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
    if total is None and micro is None:
        raise ConfigError(
            f"neither train_batch_size nor train_micro_batch_size_per_gpu is set; set one of them ({_RULE})"
        )
    piece = (micro or 1) * (steps or 1) * dp_world_size  # must divide the total
    total = total or piece
    steps = steps or (total // piece if micro else 1)
    micro = micro or total // piece
    if total != micro * steps * dp_world_size:
        raise ConfigError(_mismatch(config, dp_world_size, total=total, piece=piece))
    update = {"train_batch_size": total, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    return config.model_copy(update=update)


def _mismatch(config: Config, dp_world_size: int, *, total: int, piece: int) -> str:
    micro, steps = config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    if micro and steps:
        fixes = [f"train_batch_size {piece}"]
        rests = {"gradient_accumulation_steps": piece // steps, "train_micro_batch_size_per_gpu": piece // micro}
        fixes += [f"{name} {total // rest}" for name, rest in rests.items() if total % rest == 0]
    else:
        below = total // piece * piece
        fixes = [f"train_batch_size {fix}" for fix in (below, below + piece) if fix]
    return (
        f"train_batch_size {total} does not split into train_micro_batch_size_per_gpu {micro or '(not set)'} * "
        f"gradient_accumulation_steps {steps or '(not set)'} * {dp_world_size} ranks; "
        f"nearest fixes: {' or '.join(fixes)} (rule: {_RULE})"
    )

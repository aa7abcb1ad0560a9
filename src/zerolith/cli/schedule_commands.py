"""`zerolith schedule`: look at a learning-rate schedule before training with it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from zerolith.config import Config, load_config
from zerolith.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

ROWS, BAR = 20, 50  # of the plot in a terminal: lines, characters
SPANS = ("total_num_steps", "total_iters", "total_steps", "T_max")  # options that say how long a schedule is


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `schedule` and its subcommand."""
    schedule = commands.add_parser("schedule", help="look at a learning-rate schedule")
    subcommands = schedule.add_subparsers(metavar="SUBCOMMAND", required=True)
    plot = subcommands.add_parser("plot", help="draw lr (and momentum) over the run, as text and as PNG")
    plot.add_argument("file", metavar="CONFIG", help="JSON file")
    plot.add_argument("--steps", type=int, metavar="N", help="optimizer steps; by default as the schedule says")
    plot.add_argument("--lr", type=float, default=1e-3, help="of the optimizer, if the config names none (%(default)s)")
    plot.add_argument("--png", type=Path, metavar="FILE", help="by default CONFIG with the ending .png")
    plot.set_defaults(run=_plot)


def _plot(arguments: argparse.Namespace) -> int:
    path = Path(arguments.file)
    config = load_config(path)
    if config.scheduler is None:
        raise ConfigError(f"{path}: scheduler: the config names no schedule; give it scheduler.type")
    steps = arguments.steps if arguments.steps is not None else _span(config.scheduler.params)
    if steps < 1:
        raise UsageError(f"--steps is {steps}; a plot needs at least one")
    rates, momenta = _simulate(config, steps, lr=arguments.lr)
    print(_drawn("lr", rates))
    if len(set(momenta)) > 1:
        print(_drawn("momentum", momenta))
    target = arguments.png or path.with_suffix(".png")
    _save(target, f"{config.scheduler.type} over {steps} steps", {"lr": rates, "momentum": momenta})
    print(f"written to {target}")
    return 0


def _span(params: dict[str, object]) -> int:
    """Steps that show all of a schedule."""
    for name in SPANS:
        if isinstance(said := params.get(name), (int, float)):
            return int(said)
    numbers = [(name, value) for name, value in params.items() if isinstance(value, (int, float))]
    return 2 * int(sum(value for name, value in numbers if name.endswith(("_steps", "_size")))) or 1000


def _simulate(config: Config, steps: int, *, lr: float) -> tuple[list[float], list[float]]:
    """lr and momentum (or beta1; 0 if neither) of the first param group at each optimizer step."""
    import torch

    optimizer, scheduler = make_named(config, lr=lr)
    assert config.scheduler is not None, "checked by the caller"
    assert scheduler is not None, "made of it"
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError("scheduler.type: ReduceLROnPlateau follows the loss, so there is nothing to draw beforehand")
    rates, momenta = [], []
    try:
        for _ in range(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            momenta.append(_momentum(optimizer))
            optimizer.step()  # without gradients: it only tells the scheduler that a step was made
            scheduler.step()
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{config.scheduler.type} cannot be drawn beyond step {len(rates)}: {error}") from error
    return rates, momenta


def make_named(config: Config, *, lr: float = 1e-3) -> "tuple[Optimizer, LRScheduler | None]":
    """The optimizer that `config` names, or SGD with `lr`, over two tensors; and its schedule. Raises ConfigError."""
    from torch import nn

    from zerolith.optim import build_optimizer, build_scheduler

    model, named = nn.Linear(2, 2), config.optimizer
    kind, options = ("SGD", {"lr": lr}) if named is None else (named.type, named.params)
    optimizer = build_optimizer(kind, options, list(model.parameters()), model)
    chosen = config.scheduler
    return optimizer, build_scheduler(chosen.type, chosen.params, optimizer) if chosen is not None else None


def _momentum(optimizer: "Optimizer") -> float:
    group = optimizer.param_groups[0]
    return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))


def _drawn(name: str, values: list[float]) -> str:
    """At most ROWS lines, one for each of some equally distant steps, and a bar from zero."""
    top = max(map(abs, values)) or 1.0
    chosen = sorted({round(row * (len(values) - 1) / (ROWS - 1)) for row in range(ROWS)})
    lines = [f"{'step':>8}  {name:>10}"]
    lines += [f"{at:>8}  {values[at]:>10.4g}  {'█' * round(BAR * abs(values[at]) / top)}" for at in chosen]
    return "\n".join(lines)


def _save(path: Path, title: str, curves: dict[str, list[float]]) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("a PNG needs matplotlib: pip install 'zerolith[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: curve for name, curve in curves.items() if name == "lr" or len(set(curve)) > 1}
    figure, panels = pyplot.subplots(len(shown), 1, sharex=True, squeeze=False, figsize=(8, 3 * len(shown)))
    for panel, (name, curve) in zip(panels[:, 0], shown.items(), strict=True):
        panel.plot(curve)
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    panels[0, 0].set_title(title)
    panels[-1, 0].set_xlabel("optimizer step")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be written ({error}); choose another with --png") from error
    pyplot.close(figure)

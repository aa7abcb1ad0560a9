"""Where a run's numbers are written for people to watch: CSV files, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from zerolith.config import Config
from zerolith.errors import ConfigError

AXIS = "samples"  # what W&B calls the horizontal axis


class Monitor(Protocol):
    """Takes the numbers of one optimizer step."""

    def write(self, numbers: Mapping[str, float], samples: int) -> None:
        """numbers: by name. samples: trained on so far, the horizontal axis."""

    def close(self) -> None: ...


class CsvMonitor:
    """One file per number, `<output_path>/<job_name>/<name>.csv`, with a line `samples,value` per step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[str]] = {}

    def write(self, numbers: Mapping[str, float], samples: int) -> None:
        for name, value in numbers.items():
            if name not in self._files:
                self._files[name] = self._open(name)
            csv.writer(self._files[name]).writerow((samples, value))
            self._files[name].flush()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _open(self, name: str) -> IO[str]:
        flat = name.replace("/", "_")
        path = self._folder / f"{flat}.csv"
        is_new = not path.exists()
        file = path.open("a", newline="")
        if is_new:
            csv.writer(file).writerow(("step", flat))
        return file


class TensorBoardMonitor:
    """Event files in `<output_path>/<job_name>`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("tensorboard.enabled: tensorboard is not installed; pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder))  # untyped in torch

    def write(self, numbers: Mapping[str, float], samples: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, samples)

    def close(self) -> None:
        self._writer.close()


class WandbMonitor:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine.

    Where the application has a run under way, the numbers go into that one, which stays open. Samples are a number of
    their own and not the run's step, so the application may log in steps that it counts itself.
    """

    _opened: ClassVar[set[str]] = set()  # runs of engines that are alive

    def __init__(self, *, project: str, group: str | None, team: str | None) -> None:
        try:
            import wandb
            from wandb import Error, init  # a folder of past runs, named wandb, can be imported as well
        except ImportError as error:
            raise ConfigError("wandb.enabled: wandb is not installed; pip install wandb") from error
        self._is_ours = wandb.run is None or wandb.run.id in self._opened
        beside = {"reinit": "create_new"} if wandb.run is not None and self._is_ours else {}
        try:
            self._run: Any = init(project=project, group=group, entity=team, **beside)  # wandb may be without types
        except Error as error:
            raise ConfigError(
                f"wandb.enabled: no run can be started ({error}); WANDB_MODE=offline needs no account"
            ) from error
        if self._is_ours:
            self._opened.add(self._run.id)
        self._run.define_metric("Train/Samples/*", step_metric=AXIS)

    def write(self, numbers: Mapping[str, float], samples: int) -> None:
        self._run.log({AXIS: samples, **numbers})

    def close(self) -> None:
        if self._is_ours:
            self._run.finish()
            self._opened.discard(self._run.id)


def make_monitors(config: Config) -> list[Monitor]:
    """The monitors that the config enables. Raises ConfigError where one cannot be opened."""
    made: list[Monitor] = []
    for name, section in (("csv_monitor", config.csv_monitor), ("tensorboard", config.tensorboard)):
        if section.enabled:
            folder = Path(section.output_path or "runs") / section.job_name
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{name}.output_path: {folder} cannot be made ({error})") from error
            made.append(CsvMonitor(folder) if name == "csv_monitor" else TensorBoardMonitor(folder))
    if config.wandb.enabled:
        made.append(WandbMonitor(project=config.wandb.project, group=config.wandb.group, team=config.wandb.team))
    return made

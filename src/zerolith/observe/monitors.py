"""Where a run's numbers are written for people to watch: CSV files, TensorBoard, Weights & Biases."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from zerolith.config import Config
from zerolith.errors import ConfigError


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
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, *, project: str, group: str | None, team: str | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("wandb.enabled: wandb is not installed; pip install wandb") from error
        self._run: Any = wandb.init(project=project, group=group, entity=team)

    def write(self, numbers: Mapping[str, float], samples: int) -> None:
        self._run.log(dict(numbers), step=samples)

    def close(self) -> None:
        self._run.finish()


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

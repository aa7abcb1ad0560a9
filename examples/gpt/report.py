"""What a run shows and leaves behind. Only rank 0 has a RunFolder; the others' Report keeps quiet."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from gpt.records import StepRecord

MIB = 2**20


class Report:
    """Listens to a run and does nothing: the report of every rank but the first."""

    def say(self, text: str) -> None:
        """Show a line."""

    def summary(self, text: str) -> None:
        """Show and keep the start-up summary."""

    def sample(self, title: str, text: str) -> None:
        """Show and keep generated text."""

    def advance(self, step: int) -> None:
        """The progress bar's step is done."""

    def record(self, record: StepRecord) -> None:
        """Keep a logged step."""

    def result(self, facts: dict[str, Any]) -> None:  # Any: JSON
        """Keep how the run ended."""

    def close(self) -> None:
        """Nothing more will come."""


class RunFolder(Report):
    """Owner of a run's folder, its TensorBoard events and the progress bar."""

    def __init__(self, folder: Path, *, num_steps: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.records: list[StepRecord] = []
        for stale in (folder / "tensorboard").glob("events.out.tfevents.*"):
            stale.unlink()  # TensorBoard would draw both runs as one curve
        self._samples = (folder / "samples.txt").open("w", encoding="utf-8")
        self._metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"))
        self._bar = tqdm(total=num_steps, unit="step", dynamic_ncols=True, mininterval=0.5)

    def say(self, text: str) -> None:
        tqdm.write(text)

    def summary(self, text: str) -> None:
        self.say(text)
        (self.folder / "summary.txt").write_text(text + "\n", encoding="utf-8")

    def sample(self, title: str, text: str) -> None:
        framed = f"--- {title} ---\n{text}\n"
        self.say(framed)
        self._samples.write(framed + "\n")
        self._samples.flush()

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def record(self, record: StepRecord) -> None:
        self.records.append(record)
        values = {name: value for name, value in record._asdict().items() if _is_number(value)}
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if name != "step":
                self._events.add_scalar(name, value, record.step)
        self._bar.set_postfix_str(_postfix(record))
        if record.val_loss is not None:
            self.say(f"step {record.step}: validation loss {record.val_loss:.3f} nats/byte")

    def result(self, facts: dict[str, Any]) -> None:  # Any: JSON
        (self.folder / "result.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        self._bar.close()
        self._events.close()
        self._metrics.close()
        self._samples.close()


def _is_number(value: float | None) -> bool:
    """JSON has no NaN and no infinity, such as the norm of a step that overflowed."""
    return value is not None and math.isfinite(value)


def _postfix(record: StepRecord) -> str:
    parts = [f"mem {record.peak_bytes / MIB:,.0f} MiB"]
    if record.tokens_per_s is not None:
        parts.insert(0, f"{record.tokens_per_s:,.0f} tok/s")
    if record.loss is not None:
        parts.insert(0, f"loss {record.loss:.3f}")
    return ", ".join(parts)

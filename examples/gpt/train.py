"""The training loop: what any script that drives the engine looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.clock import Clock
from gpt.data import Batch, TrainingBatches
from gpt.evaluate import validation_loss
from gpt.memory import peak_bytes
from gpt.ranks import sum_over_ranks
from gpt.records import Outcome, StepRecord
from gpt.report import Report
from zerolith import Engine

LOG_INTERVAL = 5  # steps


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """One run's training on one rank; all ranks call everything alike."""

    engine: Engine
    batches: TrainingBatches
    validation: Sequence[Batch]
    clock: Clock
    report: Report
    num_steps: int
    eval_interval: int

    def fit(self) -> Outcome:
        """Train until the last step or until time is short. Collective."""
        self._tell(0, loss=None, val_loss=self._evaluate(), tokens_per_s=None)
        window, logged_step = self._no_loss(), 0
        for step in range(1, self.num_steps + 1):
            window += self._train_step(step - 1)
            self.report.advance(step)
            evaluates = step % self.eval_interval == 0 or step == self.num_steps
            if not evaluates and step % LOG_INTERVAL:
                continue
            num_steps = step - logged_step
            own_loss = window.item() / num_steps  # waits for the device, so it comes before the clock
            window_s = self.clock.end_window()
            loss, out_of_time = self._agree(own_loss)
            val_loss = self._evaluate() if evaluates or out_of_time else None
            self._tell(step, loss=loss, val_loss=val_loss, tokens_per_s=num_steps * self.tokens_per_step / window_s)
            if val_loss is not None and (out_of_time or step == self.num_steps):
                speed = step * self.tokens_per_step / self.clock.training_s
                return Outcome(step, val_loss, speed, out_of_time=step < self.num_steps)
            window, logged_step = self._no_loss(), step
        raise AssertionError("the last step evaluates and returns")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        batch_tokens = self.batches.batch_size * self.batches.seq_len
        return batch_tokens * self.engine.gradient_accumulation_steps() * self.engine.dp_world_size

    def _train_step(self, step: int) -> Tensor:
        """One optimizer step; returns this rank's mean loss, a 0-d tensor on the device."""
        engine, total = self.engine, self._no_loss()
        num_micro, ranks = engine.gradient_accumulation_steps(), engine.dp_world_size
        for micro in range(num_micro):
            # Numbered over ranks first: other world sizes with the same global batch see the same data.
            batch = self.batches.batch((step * num_micro + micro) * ranks + engine.global_rank)
            loss = engine(self._to_device(batch.tokens), self._to_device(batch.targets))
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        return total / num_micro

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.engine.device, non_blocking=True)

    def _no_loss(self) -> Tensor:
        return torch.zeros((), device=self.engine.device)

    def _agree(self, loss: float) -> tuple[float, bool]:
        """Mean loss over ranks, and whether any rank is out of time. Collective."""
        total, votes = sum_over_ranks([loss, float(self.clock.must_stop())], self.engine.device)
        return total / self.engine.dp_world_size, votes > 0

    def _evaluate(self) -> float:
        with self.clock.paused():
            return validation_loss(self.engine, self.validation)

    def _tell(self, step: int, *, loss: float | None, val_loss: float | None, tokens_per_s: float | None) -> None:
        engine = self.engine
        norm = engine.get_global_grad_norm() if step else None
        self.report.record(
            StepRecord(
                step=step,
                loss=loss,
                val_loss=val_loss,
                learning_rate=engine.get_lr()[0],
                grad_norm=None if norm is None else float(norm),
                tokens_per_s=tokens_per_s,
                peak_bytes=peak_bytes(engine.device),
                skipped_steps=engine.skipped_steps,
                seconds=self.clock.elapsed_s,
            )
        )

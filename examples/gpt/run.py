"""One run on one rank, from settings to result.json."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import zerolith
from zerolith import Engine

from gpt.bigram import bigram_loss
from gpt.clock import Clock
from gpt.data import Batch, Corpus, TrainingBatches, validation_batches
from gpt.evaluate import generate
from gpt.memory import STAGES, bytes_at_stage, peak_bytes
from gpt.model import GPT
from gpt.picture import draw_run
from gpt.ranks import max_over_ranks
from gpt.records import MeasuredBytes, Outcome
from gpt.report import MIB, Report, RunFolder
from gpt.settings import Settings
from gpt.train import Trainer, schedule

VALIDATION_BYTES = 32_768  # of the validation text, for every evaluation
SAMPLE_PROMPT = b"def "
SAMPLE_BYTES = 160


def make_repeatable(seed: int) -> None:
    """Same arguments, same losses: also on CUDA, whose fastest kernels add in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def make_engine(settings: Settings) -> Engine:
    """The model, sharded as the config says. Collective."""
    model = GPT(settings.shape)
    if settings.compile:
        for block in model.blocks:
            # Forward alone, so that the engine's hooks around a block stay outside the compiled graph.
            block.forward = torch.compile(block.forward)
    engine, *_ = zerolith.initialize(
        model=model, config=settings.config, lr_scheduler=schedule(settings.steps)
    )
    return engine


def pretrain(settings: Settings, *, started: float) -> None:
    """Train, sample and report as one of the ranks; `started` is on time.monotonic's scale. Collective."""
    make_repeatable(settings.seed)
    zerolith.init_distributed()
    corpus = Corpus.of_standard_library()
    engine = make_engine(settings)
    report = RunFolder(settings.folder, num_steps=settings.steps) if engine.global_rank == 0 else Report()
    report.summary(f"{engine.summary()}\n\n{corpus}")
    micro_batch, seq_len = engine.train_micro_batch_size_per_gpu(), settings.shape.seq_len
    validation = validation_batches(
        corpus.validation, batch_size=micro_batch, seq_len=seq_len, num_windows=max(1, VALIDATION_BYTES // seq_len)
    )
    began = time.monotonic()
    sample(engine, settings, report, title="before training")
    trainer = Trainer(
        engine=engine,
        batches=TrainingBatches(
            stream=corpus.training, batch_size=micro_batch, seq_len=seq_len, seed=settings.seed
        ),
        validation=validation,
        clock=Clock(
            started=started, limit_s=60 * settings.max_minutes, closing_s=time.monotonic() - began + DRAWING_S
        ),
        report=report,
        num_steps=settings.steps,
        eval_interval=settings.eval_interval,
    )
    outcome = trainer.fit()
    sample(engine, settings, report, title=f"after {outcome.steps} steps")
    peak = max_over_ranks(peak_bytes(engine.device), engine.device)
    if isinstance(report, RunFolder):
        bigram = bigram_loss(corpus.training, validation, vocab=settings.shape.vocab)
        finding = Finding(outcome, bigram, peak, MeasuredBytes(**engine.summary().bytes_per_rank), corpus)
        conclude(report, settings, finding, seconds=trainer.clock.elapsed_s)
    report.close()
    engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


def sample(engine: Engine, settings: Settings, report: Report, *, title: str) -> None:
    """Let the model write. Collective."""
    written = generate(
        engine, SAMPLE_PROMPT, num_bytes=SAMPLE_BYTES, seq_len=settings.shape.seq_len, seed=settings.seed
    )
    report.sample(title, written.decode("utf-8", errors="replace"))



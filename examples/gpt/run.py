"""One run on one rank, from settings to the files in its folder."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import zerolith
from gpt.bigram import bigram_loss
from gpt.clock import Clock
from gpt.conclude import Finding, conclude
from gpt.data import Corpus, TrainingBatches, validation_batches
from gpt.evaluate import generate
from gpt.memory import peak_bytes
from gpt.model import GPT
from gpt.ranks import max_over_ranks
from gpt.records import MeasuredBytes
from gpt.report import Report, RunFolder
from gpt.schedule import schedule
from gpt.settings import Settings
from gpt.train import Trainer
from zerolith import Engine

VALIDATION_BYTES = 16_384  # of the validation text, in every evaluation
SAMPLE_PROMPT = b"def "
SAMPLE_BYTES = 160


def pretrain(settings: Settings, *, started: float) -> None:
    """Train, sample and report as one of the ranks; `started` is on time.monotonic's scale. Collective."""
    make_repeatable(settings.seed)
    zerolith.init_distributed()
    corpus = Corpus.of_standard_library()
    model = make_model(settings)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = zerolith.initialize(model=model, config=settings.config, lr_scheduler=schedule(settings.steps))
    is_first = engine.global_rank == 0
    report = RunFolder(settings.folder, num_steps=settings.steps) if is_first else Report()
    report.summary(f"{engine.summary()}\n\n{corpus}")
    trainer = make_trainer(settings, engine, corpus, report, started=started)
    bigram = bigram_loss(corpus.training, trainer.validation, vocab=settings.shape.vocab)
    report.say(f"bigram model: validation loss {bigram:.3f} nats/byte")
    with trainer.clock.rehearsed():
        write_sample(engine, settings, report, title="before training")
    outcome = trainer.fit()
    write_sample(engine, settings, report, title=f"after {outcome.steps} steps")
    finding = Finding(
        outcome=outcome,
        bigram_loss=bigram,
        peak_bytes=int(max_over_ranks(peak_bytes(engine.device), engine.device)),
        measured=MeasuredBytes(**engine.summary().bytes_per_rank),
        num_parameters=num_parameters,
        device=engine.device,
        seconds=trainer.clock.elapsed_s,
    )
    if isinstance(report, RunFolder):
        conclude(report, settings, corpus, finding)
    report.close()
    engine.destroy()
    if dist.is_initialized():
        dist.destroy_process_group()


def make_repeatable(seed: int) -> None:
    """Same arguments, same losses: also on CUDA, whose fastest kernels add in any order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that comes with it and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by name


def make_model(settings: Settings) -> GPT:
    """The model, whole, on the CPU."""
    model = GPT(settings.shape)
    if settings.compile:
        for block in model.blocks:
            # Forward alone, so that the engine's hooks around a block stay outside the compiled graph.
            block.forward = torch.compile(block.forward)
    return model


def make_trainer(settings: Settings, engine: Engine, corpus: Corpus, report: Report, *, started: float) -> Trainer:
    """The training loop over this corpus; all ranks evaluate on the same windows."""
    batch_size, seq_len = engine.train_micro_batch_size_per_gpu(), settings.shape.seq_len
    return Trainer(
        engine=engine,
        batches=TrainingBatches(stream=corpus.training, batch_size=batch_size, seq_len=seq_len, seed=settings.seed),
        validation=validation_batches(
            corpus.validation,
            batch_size=batch_size,
            seq_len=seq_len,
            num_windows=max(1, VALIDATION_BYTES // seq_len),
        ),
        clock=Clock(started=started, limit_s=60 * settings.max_minutes),
        report=report,
        num_steps=settings.steps,
        eval_interval=settings.eval_interval,
    )


def write_sample(engine: Engine, settings: Settings, report: Report, *, title: str) -> None:
    """Let the model write. Collective."""
    written = generate(
        engine, SAMPLE_PROMPT, num_bytes=SAMPLE_BYTES, seq_len=settings.shape.seq_len, seed=settings.seed
    )
    text = written.decode("utf-8", errors="replace")
    # An untrained model writes control characters too, which a terminal would obey.
    report.sample(title, "".join(char if char.isprintable() or char in "\n\t" else "·" for char in text))

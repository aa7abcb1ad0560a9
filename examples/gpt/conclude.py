"""The end of a run on rank 0: result.json, the picture, and the verdict."""

from __future__ import annotations

import platform
from typing import Any, NamedTuple

import torch

import zerolith
from gpt.data import Corpus
from gpt.memory import STAGES, bytes_at_stage
from gpt.picture import Memory, draw_run
from gpt.records import MeasuredBytes, Outcome
from gpt.report import MIB, RunFolder
from gpt.settings import Settings


class Finding(NamedTuple):
    """What a run has found out; losses are in nats per byte."""

    outcome: Outcome
    bigram_loss: float
    peak_bytes: int  # of the rank that needed most
    measured: MeasuredBytes
    num_parameters: int
    device: torch.device
    seconds: float  # from the start to the last sample


def conclude(report: RunFolder, settings: Settings, corpus: Corpus, finding: Finding) -> None:
    """Write what is left to write and say how it went."""
    report.result(result_json(settings, corpus, finding))
    memory = Memory(
        by_stage=[
            bytes_at_stage(
                stage,
                num_parameters=finding.num_parameters,
                ranks=settings.ranks,
                precision=settings.precision,
            )
            for stage in STAGES
        ],
        measured=finding.measured,
        stage=settings.stage,
        ranks=settings.ranks,
    )
    size = f"{finding.num_parameters / 1e6:.2f} M parameters"
    title = f"zerolith: {size}, stage {settings.stage}, {settings.precision}"
    draw_run(report.folder / "training.png", report.records, memory, title=title, bigram_loss=finding.bigram_loss)
    report.say(verdict(finding))
    report.say(f"written to {report.folder}/")


def verdict(finding: Finding) -> str:
    """The run in three lines."""
    outcome, bigram = finding.outcome, finding.bigram_loss
    relation = "below" if outcome.val_loss < bigram else "not below"
    stopped = ", stopped by --max-minutes" if outcome.out_of_time else ""
    state, peak = sum(finding.measured) / MIB, finding.peak_bytes / MIB
    return (
        f"validation loss {outcome.val_loss:.3f} nats/byte, {relation} the bigram model's {bigram:.3f}\n"
        f"{outcome.steps} steps in {finding.seconds:.0f} s{stopped}, {outcome.tokens_per_s:,.0f} tokens/s\n"
        f"model state {state:.1f} MiB per rank, peak memory {peak:,.0f} MiB"
    )


def result_json(settings: Settings, corpus: Corpus, finding: Finding) -> dict[str, Any]:  # Any: JSON
    """Everything that result.json holds."""
    return {
        **finding.outcome._asdict(),
        "bigram_val_loss": finding.bigram_loss,
        "seconds": round(finding.seconds, 1),
        "peak_bytes": finding.peak_bytes,
        "peak_kind": "device memory" if finding.device.type == "cuda" else "resident memory",
        "state_bytes_per_rank": finding.measured._asdict(),
        "parameters": finding.num_parameters,
        "corpus": {
            "files": corpus.num_files,
            "training_bytes": len(corpus.training),
            "validation_bytes": len(corpus.validation),
            "digest": corpus.digest,
        },
        "settings": settings.as_json(),
        "versions": {
            "zerolith": zerolith.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"device": device_name(finding.device), "system": platform.platform()},
    }


def device_name(device: torch.device) -> str:
    """What computed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads per rank"

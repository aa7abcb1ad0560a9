"""The training whose states are saved here, and what tells one state from another: hashes of all that is in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plain import MICRO, Batch, config_for, loss_of, make_batches, my_micro_batches, start, whole_weights, world_size
from zerolith.checkpoint import Content, Job, Reader, Saver, Sharded, find, tag_folder
from zerolith.checkpoint.folder import DEFAULT_TAG, committed
from zerolith.checkpoint.manifest import MANIFEST
from zerolith.checkpoint.training_state import add_buffers, add_parameters
from zerolith.comm import Comm

SAMPLES = 12 * MICRO  # in a step: micro-batches for 1, 2, 3 and 4 ranks alike
NOTHING = "nothing"
BATCHES = make_batches(6, SAMPLES)


def make_small() -> nn.Sequential:
    """Few parameters, so that a save has few operations: a matrix that is cut between ranks, a bias, a vector."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def config(stage: int, **overrides: Any) -> dict[str, Any]:
    """AdamW; as many micro-batches as give SAMPLES on any number of ranks."""
    zero = {"stage3_param_persistence_threshold": 10, **overrides.pop("zero_optimization", {})}
    gas = SAMPLES // MICRO // world_size()
    optimizer = {"type": "AdamW", "params": {"lr": 1e-2}}
    return config_for(stage, gas=gas, optimizer=optimizer, zero_optimization=zero, **overrides)


def make_engine(stage: int, **overrides: Any) -> Any:  # an Engine
    """Collective, as all that follows."""
    return start(config(stage, **overrides), model=make_small())


def train(engine: Any, batches: Iterable[Batch]) -> None:
    for batch in batches:
        for micro_batch in my_micro_batches(batch):
            engine.backward(loss_of(engine, micro_batch))
            engine.step()


def run_on(engine: Any, *, to: int) -> None:
    """Train until `to` steps are done."""
    train(engine, BATCHES[engine.global_steps : to])


def logical_state(engine: Any) -> dict[str, Tensor | str]:
    """Values and optimizer states of every parameter, whole, and weights as forward sees them; on every rank."""
    content, sharded = Content(), Sharded(engine._sharded, engine._partitioned)
    add_parameters(content, sharded, exclude_frozen=False, with_gradients=False)
    add_buffers(content, sharded)
    own = [(p.name, p.shape, p.range.start, p.range.stop, p.data.clone()) for p in content.parts if p.range.numel]
    state: dict[str, Tensor | str] = {}
    filled: dict[str, int] = {}
    for row in engine._sharded.comm.all_gather_bytes(pickle.dumps((own, content.optimizer)), name="whole state"):
        parts, scalars = pickle.loads(row)
        state |= {f"scalars/{name}": json.dumps(values, sort_keys=True) for name, values in scalars.items()}
        for name, shape, first, stop, data in parts:
            whole = state.setdefault(name, torch.empty(shape, dtype=data.dtype))
            assert isinstance(whole, Tensor), "only names of scalars begin with scalars/"
            whole.view(-1)[first:stop] = data
            filled[name] = filled.get(name, 0) + stop - first
    assert all(filled[name] == each.numel() for name, each in state.items() if isinstance(each, Tensor))
    return state | {f"weights/{name}": weight for name, weight in whole_weights(engine).items()}


def digest_of(state: dict[str, Tensor | str]) -> str:
    """A hash of names, types, shapes and bits."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        described = [name, str(value.dtype), list(value.shape)] if isinstance(value, Tensor) else [name, value]
        total.update(json.dumps(described).encode())
        if isinstance(value, Tensor):
            total.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()


def engine_digest(engine: Any) -> str:
    """Of all ranks together, the same on each. Collective."""
    return digest_of(logical_state(engine))


def checkpoint_digest(home: Path) -> str:
    """Of everything in a checkpoint but the time and id of its save. Raises CheckpointError if it does not load."""
    with Reader(home) as reader:
        state: dict[str, Tensor | str] = {name: reader.tensor(name) for name in reader.manifest.tensors}
        told = reader.manifest.model_dump(include={"step", "num_ranks", "parameters", "state"}, mode="json")
        return digest_of(state | {"told": json.dumps(told, sort_keys=True)})


def loads_as(folder: Path, names: dict[str, str], digest: Callable[[Path], str] = checkpoint_digest) -> str:
    """The name, by digest, of the state that loading `folder` without a tag gives.

    Whatever else there claims to be a checkpoint is checked, too. Raises CheckpointError if it does not load.
    """
    found = find(folder, None)
    tags = {*found, *(tag for tag, _ in committed(folder))}
    digests = {tag: digest(tag_folder(folder, tag)) for tag in tags}
    unknown = [tag for tag, each in digests.items() if each not in names]
    assert not unknown, f"{unknown} are mixtures"
    return names[digests[found[0]]] if found else NOTHING


def left_overs(folder: Path) -> list[str]:
    """What is neither part of a checkpoint nor `latest` nor the lock; empty folders only if their name is a save's."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            named = {file.name for tag, manifest in committed(folder) if tag == path.name for file in manifest.files}
            inside = {each.name for each in path.iterdir()}
            found += [f"{path.name}/{name}" for name in sorted(inside - named - {MANIFEST})]
            found += [path.name] if not inside and DEFAULT_TAG.fullmatch(path.name) else []
        elif path.name not in ("latest", ".zerolith.lock"):
            found.append(path.name)
    return found


# --- saves without engines ---------------------------------------------------------------------------


class Recorder:
    """Stands for an engine's Saver, and keeps what it was to save."""

    is_busy = False

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def save(self, job: Job) -> None:
        parts = [dataclasses.replace(part, data=part.data.clone()) for part in job.content.parts]
        content = Content(parts=parts, optimizer=job.content.optimizer, rank_state=job.content.rank_state)
        content.close = int  # does nothing, and can be sent to another process
        self.jobs.append(dataclasses.replace(job, content=content))

    def poll(self, comm: Comm) -> bool:
        return True

    def close(self) -> None:
        pass


def record_jobs(stage: int, steps: int) -> list[Job]:
    """In a rank: what it would write after each of so many steps."""
    engine = make_engine(stage)
    recorder = engine._saver = Recorder()
    for step in range(1, steps + 1):
        run_on(engine, to=step)
        engine.save_checkpoint("unused")
    engine.destroy()
    return recorder.jobs


def redirected(job: Job, folder: Path, **changes: Any) -> Job:
    """The same content for another place."""
    return dataclasses.replace(job, folder=folder, **changes)


def solo_saver(disk: Any) -> Saver:
    """A Saver of one rank."""
    return Saver(Comm(None, torch.device("cpu")), disk, threads=0)

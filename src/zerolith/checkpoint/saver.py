"""Writing checkpoints: all ranks together, at once or in a thread behind the training."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from zerolith.checkpoint.content import Content
from zerolith.checkpoint.disk import Disk, write_file
from zerolith.checkpoint.folder import (
    Kept,
    Lock,
    left_over,
    make_folder,
    prune,
    sweep,
    tag_folder,
    take_lock,
    write_latest,
)
from zerolith.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    ParameterRecord,
    TensorRecord,
    encode,
    read_manifest,
)
from zerolith.checkpoint.shard_file import Written, read_back, write_shard
from zerolith.checkpoint.snapshot import Snapshot
from zerolith.comm import Comm, agree
from zerolith.errors import CheckpointError, DistributedError, OffloadError
from zerolith.memory.threads import helpers

logger = logging.getLogger("zerolith")

TIMEOUT = timedelta(hours=2)  # that ranks wait for the slowest one's disk; a dead rank is noticed at once


@dataclass(frozen=True, kw_only=True)
class Job:
    """One checkpoint to be written. `parameters`, `state` and `libraries` are rank 0's."""

    folder: Path
    tag: str
    step: int
    content: Content
    parameters: dict[str, ParameterRecord]
    state: dict[str, Any]  # JSON
    libraries: dict[str, str]
    is_latest: bool = True
    kept: Kept = field(default_factory=Kept)
    read_back: bool = False  # and compare before it counts


class Saver:
    """Owner of a job's lock, of the thread that writes and of the memory of its snapshots. Every rank has one.

    All methods are collective: every rank makes the same calls in the same order. `comm` is not used by anything else.
    """

    def __init__(self, comm: Comm, disk: Disk, *, threads: int = 1) -> None:
        self.comm = comm
        self.disk = disk
        self._hashers = helpers(threads, "zerolith checksum")
        self._locks: dict[Path, Lock] = {}
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._outcome: list[Exception | None] = []  # of the thread, once it is done

    def save(self, job: Job) -> None:
        """Write a checkpoint; returns when it would survive a power cut. Raises CheckpointError on every rank."""
        self.flush()
        with self._claim(job):
            self._write(job)

    def save_behind(self, job: Job) -> None:
        """Copy the checkpoint's tensors and write them in a thread; `poll` or `flush` tell how that went.

        Raises CheckpointError on every rank if one has no memory for its copy or for a thread.
        """
        self.flush()
        given: SimpleQueue[Job | None] = SimpleQueue()
        claim = self._claim(job)
        thread = threading.Thread(target=self._write_behind, args=(given, claim), name="zerolith checkpoint")
        try:
            with self._together("copying a checkpoint", job.folder / job.tag):
                snapshot = self._copy(job)
                thread.start()
        except BaseException:
            given.put(None)
            claim.close()
            raise
        self._outcome, self._thread = [], thread
        given.put(snapshot)

    @property
    def is_busy(self) -> bool:
        """Whether a save behind the training has not been told of yet; the same on every rank."""
        return self._thread is not None

    def poll(self, comm: Comm) -> bool:
        """Whether the save behind the training, if any, is done on all ranks; raises its error if it failed.

        comm: the training's own, for this is called by the thread that trains.
        """
        if self._thread is None:
            return True
        if comm.max([float(not self._outcome)], name="checkpoint under way")[0]:
            return False
        self._raise_outcome()
        return True

    def flush(self) -> None:
        """Wait for the save behind the training; raises its error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._raise_outcome()

    def close(self) -> None:
        """Let go of the locks, the memory and the threads; what is being written is finished first."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._hashers is not None:
            self._hashers.shutdown()
        self._snapshot.clear()
        self._locks.clear()

    def lock(self, folder: Path) -> None:
        """Make `folder` this job's own, and sweep it. Raises CheckpointError on every rank."""
        with self._together("locking the checkpoint folder", folder):
            self._lock(folder)

    def _lock(self, folder: Path) -> None:
        if self.comm.rank == 0 and folder not in self._locks:
            make_folder(self.disk, folder)
            lock, is_new = take_lock(folder)
            gone = sweep(self.disk, folder) if is_new else []  # another engine of this process may be writing
            self._locks[folder] = lock
            if gone:
                logger.info("%s: %d files of unfinished checkpoints were removed", folder, len(gone))

    def _raise_outcome(self) -> None:
        (error,), self._thread = self._outcome, None
        if error is not None:
            raise error

    def _write_behind(self, given: SimpleQueue[Job | None], claim: ExitStack) -> None:
        job = given.get()
        if job is None:
            return  # some rank has no copy
        try:
            with claim:
                self._write(job)
        except Exception as error:  # whatever it is, the thread that trains must learn of it
            logger.error("checkpoint %s was not saved: %s", job.tag, error)  # now: it may never ask again
            self._outcome.append(error)
        else:
            self._outcome.append(None)

    def _copy(self, job: Job) -> Job:
        try:
            parts = self._snapshot.take(job.content.parts)
        except (MemoryError, RuntimeError, OffloadError) as error:  # torch raises RuntimeError where there is no memory
            raise CheckpointError(
                f"no copy of the checkpoint could be made, which async_save needs on the host: {error}"
            ) from error
        return replace(job, content=replace(job.content, parts=parts))

    @contextmanager
    def _together(self, doing: str, path: Path) -> Iterator[None]:
        """All ranks leave it, or all raise CheckpointError: OSError here becomes one that names `path`."""
        error: Exception | None = None
        try:
            yield
        except OSError as caught:
            error = CheckpointError(f"{caught.filename or path}: {caught.strerror or caught} while {doing}")
            error.__cause__ = caught
        except Exception as caught:  # the other ranks must not wait for this one
            error = caught
        agree(self.comm, error, doing=doing, kind=CheckpointError)

    def _claim(self, job: Job) -> ExitStack:
        """The tag, for this engine alone until the stack is closed. Raises CheckpointError on every rank."""
        with ExitStack() as claim:
            with self._together("preparing a checkpoint", job.folder / job.tag):
                tag_folder(job.folder, job.tag)
                self._lock(job.folder)
                if self.comm.rank == 0:
                    claim.enter_context(self._locks[job.folder].writing(job.tag))
            return claim.pop_all()

    def _write(self, job: Job) -> None:
        """The commit. See [Note: commit] in folder.py."""
        home = job.folder / job.tag
        chosen = self.comm.all_gather_bytes(f"{secrets.token_hex(8)} {job.tag}".encode(), name="checkpoint id")
        save_id, tag = chosen[0].decode().split(" ", 1)
        path = home / f"rank-{self.comm.rank:05d}-{save_id}.safetensors"
        with self._together("making a folder for the checkpoint", home):
            if tag != job.tag:
                raise CheckpointError(f"ranks save under different tags: rank 0 {tag!r}, this rank {job.tag!r}")
            if self.comm.rank == 0:
                make_folder(self.disk, home)
        try:
            with self._together("writing a checkpoint", path):
                row = _row(self._write_own(job, path, save_id), job.content)
            rows = self.comm.all_gather_bytes(row, name="checkpoint index")
            with self._together("committing a checkpoint", home / MANIFEST):
                if self.comm.rank == 0:
                    self._commit(job, home, save_id, [json.loads(row) for row in rows])
        except DistributedError:
            raise  # a rank is gone: what is left of the save is swept at the next start
        except Exception:
            self._clean(home, path, save_id)
            raise

    def _write_own(self, job: Job, path: Path, save_id: str) -> Written | None:
        is_first = self.comm.rank == 0  # who writes tensors without elements, of which no rank has a part
        parts = [part for part in job.content.parts if part.range.numel or (is_first and 0 in part.shape)]
        if not path.parent.is_dir():
            raise CheckpointError(f"{path.parent}: not to be seen from here; ranks must save to storage that all share")
        if not parts:
            return None
        written = write_shard(self.disk, path, parts, checkpoint=save_id, hashers=self._hashers)
        if job.read_back:
            read_back(path, written)
        return written

    def _commit(self, job: Job, home: Path, save_id: str, rows: list[dict[str, Any]]) -> None:
        manifest = _merge(job, save_id, rows)
        self.disk.sync_dir(home)
        with suppress(FileNotFoundError):
            self.disk.unlink(home / f"{MANIFEST}.new")  # of a save that died
        write_file(self.disk, home / MANIFEST, encode(manifest), read_back=job.read_back)
        if job.is_latest:
            write_latest(self.disk, job.folder, job.tag, read_back=job.read_back)
        for path in left_over(home):  # of the checkpoint that was here before
            self.disk.unlink(path)
        gone = prune(self.disk, job.folder, job.kept, newest=job.tag)
        if gone:
            logger.info("checkpoints removed, as the config says: %s", ", ".join(gone))

    def _clean(self, home: Path, path: Path, save_id: str) -> None:
        """Take back what a save that failed on some rank has written, unless it has become a checkpoint. Collective."""
        is_committed = self.comm.rank == 0 and _committed_id(home) == save_id
        if self.comm.max([float(is_committed)], name="clean up")[0]:
            return
        with suppress(OSError):
            self.disk.unlink(path)
        self.comm.max([0.0], name="cleaned up")
        if self.comm.rank == 0:
            with suppress(OSError):
                self.disk.unlink(home / f"{MANIFEST}.new")
            with suppress(OSError):
                self.disk.remove_dir(home)  # which only an empty folder lets happen


def _committed_id(home: Path) -> str:
    try:
        return read_manifest(home).id
    except CheckpointError:
        return ""


def _row(written: Written | None, content: Content) -> bytes:
    """What rank 0 must know of this rank's part."""
    row = {
        "file": written.file.model_dump() if written is not None else None,
        "tensors": {name: record.model_dump() for name, record in written.tensors.items()} if written else {},
        "optimizer": content.optimizer,
        "rank_state": content.rank_state,
    }
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode()


def _merge(job: Job, save_id: str, rows: list[dict[str, Any]]) -> Manifest:
    """The manifest of all ranks' rows, by rank."""
    files: list[FileRecord] = []
    tensors: dict[str, TensorRecord] = {}
    optimizer: dict[str, Any] = {}
    for row in rows:
        optimizer |= row["optimizer"]
        for name, fields in row["tensors"].items():
            record = TensorRecord.model_validate(fields)
            pieces = [piece.model_copy(update={"file": len(files)}) for piece in record.pieces]
            tensors.setdefault(name, record.model_copy(update={"pieces": []})).pieces.extend(pieces)
        if row["file"] is not None:
            files.append(FileRecord.model_validate(row["file"]))
    for record in tensors.values():
        record.pieces.sort(key=lambda piece: piece.start)
    return Manifest(
        id=save_id,
        created=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        libraries=job.libraries,
        step=job.step,
        num_ranks=len(rows),
        files=files,
        tensors=tensors,
        parameters={
            name: record.model_copy(update={"optimizer": optimizer.get(name)})
            for name, record in job.parameters.items()
        },
        state={**job.state, "ranks": [row["rank_state"] for row in rows]},
    )

"""What an engine keeps on disk: saving, loading, and leaving in good order when the job is told to end."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from zerolith.batches import Batches
from zerolith.checkpoint import (
    TIMEOUT,
    Disk,
    Job,
    Kept,
    Preemption,
    Reader,
    Run,
    Saver,
    Sharded,
    Wants,
    agree_on_checkpoint,
    check,
    check_tag,
    collect,
    find,
    restore,
    save_weights,
    tag_folder,
    whole_state_dict,
)
from zerolith.comm import side_comm
from zerolith.errors import CheckpointDamagedError, CheckpointError, OffloadError, UsageError
from zerolith.memory.away import Away
from zerolith.optim import Filling, PartitionedOptimizer

WEIGHTS = "lp_params"  # the weights that compute, as offload_states knows them
HALF_WAY = "the last step failed half-way"

logger = logging.getLogger("zerolith")


class Checkpoints(Batches):
    """The part of an engine that saves and loads. Every rank calls its methods together."""

    global_steps: int
    global_samples: int
    skipped_steps: int
    lr_scheduler: Any  # anything with step()
    training_dataloader: Any
    client_state: Mapping[str, Any]  # saved with a checkpoint that the engine writes by itself, when the job must end
    _partitioned: PartitionedOptimizer | None
    _filling: Filling | None = None
    _saver: Saver | None = None
    _disk = Disk()
    _preemption: Preemption | None = None
    _mixture = ""  # how it came that weights and states do not belong together
    _saved_step = -1
    _away: Away | None = None  # what offload_states has moved, until reload_states
    _terms: Callable[[], float]
    _finalizer: weakref.finalize[..., Any]
    _in_backward: bool

    def save_checkpoint(
        self,
        save_dir: str | Path | None = None,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Save all that decides the next step under `save_dir`/`tag`; returns whether it was (or is being) saved.

        By default to the config's checkpoint.folder, as global_step<N>. `client_state` holds JSON values and tensors;
        rank 0's is kept. When this returns, the checkpoint survives a power cut; with checkpoint.async_save, its
        tensors have been copied, and a failure is raised by a later step. False: a save is under way, and
        checkpoint.when_busy is "drop". Raises CheckpointError on every rank; earlier checkpoints stay as they are.
        """
        self._check_ready()
        self._check_here()
        self._catch_up()
        settings, folder = self._settings.checkpoint, self._folder(save_dir)
        tag = check_tag(str(tag) if tag is not None else f"global_step{self.global_steps}")
        saver = self._open_saver()
        if saver.is_busy and settings.when_busy == "drop" and not saver.poll(self._sharded.comm):
            logger.warning("checkpoint %s is dropped: the one before it is still being written", tag)
            return False
        self._sharded.adopt_edits()
        given = client_state or {}
        content, parameters, state, libraries = collect(self._run(), given, exclude_frozen=exclude_frozen_parameters)
        job = Job(
            folder=folder,
            tag=tag,
            step=self.global_steps,
            content=content,
            parameters=parameters,
            state=state,
            libraries=libraries,
            is_latest=save_latest,
            kept=Kept(settings.keep_last, settings.keep_every),
            read_back=settings.verify_after_save,
        )
        is_swapped = self._sharded.residency.is_swapped
        is_swapped |= self._partitioned is not None and self._partitioned.residency.is_swapped
        try:
            if settings.async_save and not is_swapped:  # nobody has room for a copy of what is on disk
                saver.save_behind(job)
            else:
                saver.save(job)
        finally:
            content.close()
        self._saved_step = self.global_steps
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path | None = None,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from a checkpoint of any stage and number of ranks; returns (its folder, its client_state).

        Without a tag it is the one that `latest` names, or else the newest. (None, None) if there is none. Every byte
        is checked. Raises CheckpointError on every rank: if the checkpoint does not fit, the engine is unchanged; if
        it is damaged, the engine refuses to train until another load succeeds.
        """
        self._check_alive()
        self._check_here()
        if self._saver is not None:
            self._saver.flush()
        self._give_up_ahead()
        try:
            self._catch_up()
        except OffloadError as error:  # on every rank, and what is loaded mends it
            logger.warning("the last step failed: %s", error)
        folder = self._folder(load_dir)
        wants = Wants(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            progress=not load_module_only,
        )
        candidates = self._candidates(folder, tag)
        for number, chosen in enumerate(candidates):
            try:
                return self._load(tag_folder(folder, chosen), wants)
            except CheckpointDamagedError as error:
                if number + 1 == len(candidates):
                    raise
                logger.warning("%s; trying %s", error, candidates[number + 1])
        logger.warning("%s: there is no checkpoint here, so nothing was loaded", folder)
        return None, None

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "model.safetensors",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights in the dtype that the model computes in, whole, to one safetensors file; returns True.

        Rank 0 writes; it holds one unit at a time. Tied parameters are there once. Raises CheckpointError on every
        rank.
        """
        self._check_ready()
        self._check_here(WEIGHTS)
        self._catch_up()
        path = Path(save_dir) / save_filename
        save_weights(Sharded(self._sharded, None), self._disk, path, exclude_frozen=exclude_frozen_parameters)
        return True

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        """Whether clients may ask for all weights in one dict."""
        return self._settings.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor] | None:
        """The model's state dict on rank 0's CPU, None on other ranks. Collective. Accelerate asks for it by name."""
        self._check_ready()
        self._check_here(WEIGHTS)
        self._catch_up()
        return whole_state_dict(Sharded(self._sharded, None), exclude_frozen=exclude_frozen_parameters)

    _consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict

    # Inside

    def _prepare_checkpoints(self, preemption: Preemption | None) -> None:
        """Take the configured folder for this job now rather than at the first save. Collective."""
        self._preemption = preemption
        if self._settings.checkpoint.folder:
            self._open_saver().lock(self._folder(None))

    def _after_step(self) -> None:
        """Tell of a save behind the training; save and leave if the job is to end. Collective."""
        is_told = self._preemption is not None
        if is_told:
            flag = float(self._preemption is not None and self._preemption.requested)
            is_told = bool(self._sharded.comm.max([flag], name="preemption")[0])
        if not is_told:
            if self._saver is not None:
                self._saver.poll(self._sharded.comm)
            return
        saver = self._open_saver()
        try:
            saver.flush()
        except CheckpointError as error:  # no reason not to make the last one
            logger.error("%s", error)
            self._saved_step = -1
        if self._saved_step != self.global_steps:
            self.save_checkpoint(client_state=self.client_state)
            saver.flush()
        logger.info("told to end: step %d is saved, and the process exits", self.global_steps)
        raise SystemExit(0)

    def _close_saver(self) -> None:
        if self._saver is not None:
            self._saver.close()
            self._saver = None

    def _open_saver(self) -> Saver:
        if self._saver is None:
            side = side_comm(self._sharded.comm, timeout=TIMEOUT)
            self._saver = Saver(side, self._disk, threads=self._settings.checkpoint.writer_threads)
        return self._saver

    def _run(self) -> Run:
        counters = {
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "skipped_steps": self.skipped_steps,
            "train_batch_size": self.train_batch_size(),
            "terms": self._terms(),
            **self._micro.state_dict(),
        }
        return Run(
            sharded=Sharded(self._sharded, self._partitioned),
            scaler=self._scaler,
            scheduler=self.lr_scheduler,
            loader=self.training_dataloader,
            counters=counters,
        )

    def _candidates(self, folder: Path, tag: str | None) -> list[str]:
        """What to try to load, the same on every rank. Collective."""
        found: list[str] = []
        error: Exception | None = None
        try:
            if self.global_rank == 0:
                found = find(folder, tag, all_whole=self._settings.checkpoint.on_damage == "previous")
        except Exception as caught:  # the other ranks must not wait for this one
            error = caught
        comm = self._sharded.comm
        agree_on_checkpoint(comm, error, doing="looking for a checkpoint")
        return list(json.loads(comm.all_gather_bytes(json.dumps(found).encode(), name="tags")[0]))

    def _load(self, home: Path, wants: Wants) -> tuple[str, dict[str, Any]]:
        comm, reader, error = self._sharded.comm, None, None
        try:
            reader = Reader(home)
        except Exception as caught:  # as above
            error = caught
        agree_on_checkpoint(comm, error, doing="opening a checkpoint")
        assert reader is not None, "agreeing raises on every rank if any has failed"
        with reader:
            run = self._run()
            counters: Mapping[str, Any] = reader.manifest.state["counters"]  # type: ignore[assignment]  # an object
            names = check(run, reader.manifest, wants)
            if wants.progress:
                self._micro.resumed(counters)  # raises, on every rank, before anything has changed
            self._sharded.reset()
            self._micro.drop()
            self._mixture = f"loading {home} failed half-way"
            client_state = restore(run, reader, wants, names)
            self._mixture = ""
        if wants.progress:
            self._resume_counters(counters, has_gradients=wants.optimizer and self._partitioned is not None)
        if self.optimizer is not None:
            self.optimizer.stepped(skipped=False, loss_scale=self._scaler.scale)
        return str(home), client_state

    def _resume_counters(self, counters: Mapping[str, Any], *, has_gradients: bool) -> None:
        self.global_steps, self.global_samples = counters["global_steps"], counters["global_samples"]
        self.skipped_steps = counters["skipped_steps"]
        self._micro.load_state_dict(counters)
        if not has_gradients:
            self._micro.drop()
        elif self._micro.since_step:
            for own in self._sharded.gradients:  # a sum is divided by the terms of the run that steps
                own.rescale(self._terms() / counters["terms"])
        if counters["train_batch_size"] != self.train_batch_size() and self.global_rank == 0:
            message = "a step took %d samples when this checkpoint was saved, and takes %d now"
            logger.warning(message, counters["train_batch_size"], self.train_batch_size())

    def _check_alive(self) -> None:
        if not self._finalizer.alive:
            raise UsageError("this engine was destroyed; make a new one with zerolith.initialize")

    def _check_ready(self, *, to_step: bool = False) -> None:
        self._check_alive()
        if self._in_backward:
            raise UsageError(
                "the last backward did not finish, so gradients are incomplete; after an exception call engine.reset()"
            )
        if self._mixture:
            raise UsageError(
                f"{self._mixture}, so weights and states are a mixture; load a checkpoint or make a new engine"
            )
        if not to_step:
            self._refuse_ahead()

    def _catch_up(self) -> None:
        """Let the last step come to its end. Collective, once after each. Raises OffloadError on every rank."""
        if self._partitioned is not None:
            try:
                self._partitioned.catch_up()
            except Exception:  # not an interrupt: whoever waits on goes on
                self._mixture = HALF_WAY
                raise

    def _refuse_ahead(self) -> None:
        """Raise UsageError where nothing but step() may follow the last backward."""
        if self._partitioned is not None:
            self._partitioned.ahead.refuse()

    def _give_up_ahead(self) -> None:
        """Let updates come to their end; a step that began some in backward is not made."""
        if self._partitioned is not None:
            with self._or_mixture():
                has_begun = self._partitioned.give_up()
            self._mixture = "a backward that had begun to update was given up" if has_begun else self._mixture

    @contextmanager
    def _or_mixture(self, *, if_ahead: bool = False) -> Iterator[None]:
        """What fails in here has updated some weights and states, and others not; or backward has, if told."""
        try:
            yield
        except BaseException:  # an interrupt, too
            if not if_ahead or (self._partitioned is not None and self._partitioned.ahead.is_under_way):
                self._mixture = HALF_WAY
            raise

    def _check_here(self, *kinds: str) -> None:
        """Raise UsageError if anything is away; if `kinds` are given, only if one of them is."""
        away = self._away.kinds if self._away is not None else frozenset()
        if away and (not kinds or away & {*kinds}):
            raise UsageError(f"{', '.join(sorted(away))} are offloaded; call engine.reload_states() before")

    def _folder(self, given: str | Path | None) -> Path:
        configured = self._settings.checkpoint.folder
        if given is None and not configured:
            raise UsageError("say where checkpoints are: pass a folder, or set checkpoint.folder in the config")
        return Path(given if given is not None else configured).absolute()

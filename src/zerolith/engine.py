"""The object that people drive: forward, backward, step."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zerolith.batches import terms_of_a_sum
from zerolith.checkpoint import Sharded
from zerolith.checkpointing import drop_idle_memory
from zerolith.checkpoints import WEIGHTS
from zerolith.comm import CommsLog
from zerolith.config import Config
from zerolith.ending import let_go, let_go_aside
from zerolith.errors import UsageError
from zerolith.forward import Forward
from zerolith.hooks import graph_task
from zerolith.integrity import Integrity
from zerolith.lending import Lending
from zerolith.memory import SwapFile
from zerolith.observe import Phases, StepNumbers, Summary, Watch, summarize
from zerolith.optim import PartitionedOptimizer, ZeroOptimizer, examine, make_filling
from zerolith.outputs import on_gradient, tensors_in
from zerolith.precision import LossScaler
from zerolith.sharded_model import ShardedModel
from zerolith.status import StepReport
from zerolith.zero.marks import apply_remembered
from zerolith.zero.owners import register

logger = logging.getLogger("zerolith")

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Engine(Lending):
    """Trains `module` with its states sharded over the data-parallel ranks.

    Every rank makes the same calls in the same order; forward, backward and step communicate. Unknown attributes
    are looked up on the wrapped module.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Config,
        sharded: ShardedModel,
        scaler: LossScaler,
        optimizer: Optimizer | None,
        watch: Watch,
        handles: Sequence[Any],  # what destroy() removes
        *,
        swap: SwapFile | None = None,  # where masters and optimizer states rest
    ) -> None:
        super().__init__(config, sharded, scaler)
        self.module = module
        self.config: Mapping[str, Any] = config.raw
        self.lr_scheduler: Any = None  # anything with step()
        self.training_dataloader: Any = None
        self.global_steps = 0
        self.global_samples = 0
        self.skipped_steps = 0
        self.client_state: Mapping[str, Any] = {}
        self._syncing, self._in_backward = True, False
        self._task = -1  # the outermost of autograd's graph tasks, if it has come to an output of the module
        self._managed = False  # the backward under way is engine.backward's, or of a loss that scale() has seen
        self._terms = terms_of_a_sum(config, self._micro, scaler, ranks=sharded.comm.size)
        self._partitioned: PartitionedOptimizer | None = None
        if optimizer is not None:
            overlap = config.zero_optimization.offload_optimizer.overlap
            self._partitioned = PartitionedOptimizer(
                optimizer,
                sharded.gradients,
                sharded.comm,
                swap=swap,
                overlaps=overlap != "none",
                terms=self._terms if overlap == "backward" else None,
                guesses=overlap == "backward" and config.may_change_steps,
                checks=config.skips_steps,
                splits=config.bf16.split_master,
                copier=sharded.plan.copier,
            )
            sharded.reducer.when_summed = self._partitioned.summed
            self._filling = make_filling(config, sharded.units, self._partitioned)
            settle, all_shown = sharded.settle, self._partitioned.all_shown
            self.optimizer = ZeroOptimizer(
                optimizer, step=self.step, zero_grad=self.zero_grad, settle=settle, all_shown=all_shown
            )
        self.basic_optimizer = optimizer
        sharded.reducer.before_first = _weakly(self, Engine._on_backward)
        self._integrity = Integrity(Sharded(sharded, self._partitioned), interval=config.integrity_interval)
        self._watch = watch
        self._compiled: list[Forward] = []
        self._phase = Phases(config, sharded.comm)
        if config.comms_logger.enabled:
            sharded.comm.log = sharded.comm.log or CommsLog()
        handles = [*handles, self._phase, watch, module.register_forward_hook(_weakly(self, Engine._watch_output))]
        register(sharded, self._partitioned, self._terms)
        self._finalizer = weakref.finalize(self, let_go_aside, sharded, self._partitioned, handles, os.getpid())
        self._finalizer.atexit = False
        apply_remembered(module)

    # Forward and backward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these arguments."""
        self._check_ready()
        self._check_here(WEIGHTS)
        if torch.is_grad_enabled():
            self._micro.forward_begun()
            self._sharded.check_frozen()
        if self._settings.fp16.auto_cast and self._sharded.plan.precision.compute is not None:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self._cast, (args, kwargs))
        self._watch.saw_inputs((args, kwargs))
        with self._phase("forward"), self._autocast():
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Backward of one micro-batch; returns loss / gradient_accumulation_steps.

        loss: 0-d, this rank's mean over its micro-batch. Gradients are averaged over ranks and micro-batches; pass
        `scale_wrt_gas=False` if the loss is divided by the number of micro-batches already. Collective where
        gradients are reduced at this micro-batch.
        """
        self._check_ready()
        if self._partitioned is None:
            raise UsageError("backward() needs an optimizer; pass one to initialize or name one in the config")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(f"backward() takes a loss of one element, not {what}")
        if not loss.requires_grad:
            raise UsageError("the loss does not depend on any trainable parameter (it has requires_grad=False)")
        self._catch_up()
        steps = self._micro.per_step
        # The mean over micro-batches is taken once, at the step. A loss that is divided already is multiplied back.
        whole = loss if scale_wrt_gas else loss * steps
        scaled = whole * (self._scaler.scale * self._weight)
        self._watch.saw_loss(whole, weight=self._weight)
        self._managed, self._task = True, -1
        with self._phase("backward"):
            self._enter_backward()
            scaled.backward(retain_graph=retain_graph)
            self._leave_backward()
        return loss / steps if scale_wrt_gas else loss

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, for clients that call `.backward()` on it themselves."""
        self._check_alive()
        self._managed = True
        return loss * self._scaler.scale

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in here keep this rank's gradient whole and send nothing; the next one outside sends the sum.

        Works at every stage, at the cost of one whole gradient in the accumulation dtype per rank.
        """
        self._check_alive()
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Backwards in here keep this rank's gradient whole, as in no_sync; leaving it reduces their sum at once.

        Stages that reduce at the accumulation boundary alone (0 and 1) do so there. Collective at the end.
        """
        with self.no_sync():
            yield
        resting = self._sharded.plan.partitioning.rests_partial and not self._micro.is_last()
        if self._syncing and not resting:
            self._sharded.reducer.flush()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Decide it by hand from now on; the same on every rank."""
        self._refuse_ahead()
        self._micro.manual = is_boundary

    # Step

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Update at a gradient accumulation boundary; elsewhere do nothing.

        Collective at boundaries. Raises UsageError without a backward since the last step, and ScaleError if the
        dynamic loss scale is exhausted.
        """
        self._check_ready(to_step=True)
        self._check_here()
        self._sharded.gatherer.check_idle()
        if self._partitioned is None:
            raise UsageError("step() needs an optimizer; pass one to initialize or name one in the config")
        self._catch_up()
        since_step = self._micro.since_step
        if not self._micro.take_step():
            self._applied = False
            return
        rates = [float(lr) for lr in self.get_lr()]  # that this step uses
        self._integrity.before_step(self.global_steps + 1, [rates, self._scaler.scale, self.global_samples])
        with self._phase("step"), self._or_mixture(if_ahead=True):
            self.report = self._update(self._partitioned)
        self._applied = not self.report.skipped
        self.global_steps += 1
        counted = self._micro.per_step if self._micro.managed else since_step
        new_samples = self.train_batch_size() // self._micro.per_step * counted
        self.global_samples += new_samples
        self.skipped_steps += self.report.skipped
        if self._applied and self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        numbers = StepNumbers(
            step=self.global_steps,
            lr=rates,
            grad_norm=self.report.grad_norm,
            loss_scale=self.report.loss_scale,
            skipped_steps=self.skipped_steps,
            samples=self.global_samples,
        )
        if self._applied and self._filling is not None:
            self._filling.stepped(self._catch_up)
        self._watch.stepped(numbers, new_samples=new_samples)
        self._phase.stepped(self.global_steps)
        self._integrity.after_step(self.global_steps)
        self._after_step()

    @torch.no_grad()
    def _update(self, optimizer: PartitionedOptimizer) -> StepReport:
        sharded, settings, scale = self._sharded, self._settings, self._scaler.scale
        optimizer.ahead.step_begins()
        edited = sharded.adopt_edits()
        if edited:
            logger.info("weights were edited in place and are kept: %s", ", ".join(edited))
        sharded.reducer.finish()
        is_checked = (interval := settings.fingerprint_interval) > 0 and self.global_steps % interval == 0
        facts = examine(sharded.gradients, sharded.comm, late=sharded.reducer.late(), fingerprint=is_checked)
        if any(facts.late):
            optimizer.ahead.check_late(facts.late, sharded.gradients)
            sharded.reducer.finish(facts.late)
            facts = examine(sharded.gradients, sharded.comm)
        terms = self._terms()
        norm = facts.norm / terms
        skip = facts.overflow and settings.skips_steps
        if skip:
            optimizer.skip(facts.culprit)
        else:
            clip = settings.gradient_clipping
            coefficient = min(1.0, clip / (norm + CLIP_EPS)) if clip and not facts.overflow else 1.0
            with self._or_mixture():
                optimizer.step(facts.used, sharded.publish, grad_factor=coefficient / terms)
        sharded.reducer.reset()
        if skip and sharded.comm.rank == 0:
            message = "step %d skipped: the gradient of %s is not finite (loss scale %g)"
            logger.warning(message, self.global_steps + 1, facts.culprit, scale)
        self._scaler.update(overflow=facts.overflow, cause=facts.culprit)
        self.optimizer.stepped(skipped=skip, loss_scale=self._scaler.scale)
        return StepReport(norm, skip, scale, facts.culprit)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what has been accumulated since the last step. step() does so by itself."""
        self._check_alive()
        if not self._in_backward and self._micro.since_step:
            self._refuse_ahead()
            self._sharded.reducer.reset()
            self._micro.drop()

    def reset(self) -> None:
        """Make the engine usable again after an exception in forward, backward or step.

        Every rank calls it. Gradients since the last step are dropped; weights and optimizer states stay.
        """
        self._check_alive()
        self._in_backward, self._managed, self._task = False, False, -1
        self._give_up_ahead()
        self._sharded.reset()
        self._micro.drop()

    def compile(self, backend: Any = "inductor", compile_kwargs: Mapping[str, Any] | None = None) -> None:
        """Compile the forward of every block (of the whole model, if it has none) by torch.compile.

        Hooks on blocks stay outside the graphs, so stages 0 to 3 go on giving the same bits as each other. `backend`
        and `compile_kwargs` are torch.compile's.
        """
        self._check_alive()
        if not self._compiled:
            options = {"backend": backend, **(compile_kwargs or {})}
            self._compiled += [Forward(block, partial(torch.compile, **options)) for block in self._sharded.blocks]

    @property
    def is_compiled(self) -> bool:
        return bool(self._compiled)

    # Its end

    def summary(self) -> Summary:
        """What is sharded, bytes per rank and planned traffic. Does not communicate."""
        return summarize(self._sharded, self._partitioned, steps=self._micro.per_step)

    def destroy(self) -> None:
        """Give back all memory but the weights at rest. The model keeps its weights; at stage 3 they stay sharded."""
        if not self._finalizer.alive:
            return
        if self._settings.comms_logger.enabled and self.global_rank == 0:
            logger.info("%s", self.comms_summary())
        self._close_saver()
        self._bring_back()
        self._sharded.detach()
        for forward in reversed(self._compiled):
            forward.remove()
        ended = self._finalizer.detach()
        if ended is not None:
            let_go(*ended[2])
            drop_idle_memory()  # here, where nobody is in the midst of a checkpoint
        self._partitioned = self.optimizer = self.basic_optimizer = self.lr_scheduler = self.training_dataloader = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module" or name.startswith("_"):
                raise
            return getattr(self.module, name)

    # Inside

    def _enter_backward(self) -> None:
        self._check_here()
        self._micro.backward_begun()
        is_last = self._micro.is_last()
        if self._partitioned is not None:
            self._partitioned.backward_begins(is_last=is_last and self._syncing)
        self._in_backward = True
        resting = self._sharded.plan.partitioning.rests_partial and not is_last
        if self._task == -1:
            self._sharded.gatherer.begin_backward()
        self._sharded.reducer.begin(reducing=self._syncing and not resting, completes=is_last)

    def _leave_backward(self) -> None:
        self._task = -1
        if not self._in_backward:
            return
        self._sharded.reducer.end()
        self._sharded.gatherer.end_micro_batch()
        self._in_backward = self._managed = False
        self._micro.backward_done()

    def _watch_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Learn of a backward at its very start, so that nested backwards count as one."""
        if torch.is_grad_enabled():
            on_gradient(tensors_in(output), _weakly(self, Engine._on_output_gradient))

    def _on_output_gradient(self, *_: Any) -> None:
        """Autograd has begun something, which may be the gradient of an input, or of another model's loss."""
        if self._in_backward:
            return
        if self._task != graph_task():
            self._task = graph_task()
            self._sharded.gatherer.begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(_weakly(self, Engine._leave_backward))
        if self._sharded.reducer.will_collect():
            self._on_backward()

    def _on_backward(self, *_: Any) -> None:
        """Autograd has begun a backward: ours, or one that the client called on a tensor."""
        if self._in_backward or self._partitioned is None:
            return
        if self._scaler.scale != 1.0 and not self._managed:
            raise UsageError(
                "this precision needs loss scaling: call engine.backward(loss), or engine.scale(loss).backward()"
            )
        self._enter_backward()
        if self._task == -1:
            torch.autograd.Variable._execution_engine.queue_callback(_weakly(self, Engine._leave_backward))

    def _autocast(self) -> Any:  # a context manager
        dtype = self._sharded.plan.precision.autocast
        return torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext()

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._sharded.plan.precision.compute) if value.is_floating_point() else value


def _weakly(engine: Engine, method: Callable[..., None]) -> Callable[..., None]:
    """A method of `engine` as a hook, which must not keep a dropped engine alive and then does nothing."""
    reference = weakref.ref(engine)

    def call(*args: Any) -> None:
        this = reference()
        if this is not None:
            method(this, *args)

    return call

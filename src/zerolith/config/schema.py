"""The keys that zerolith acts on, as frozen sections. What is said of each here is its documentation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from zerolith.config.section import Count, CountOrZero, Name, Names, Section, ShortDtype, StepsOrNever, key
from zerolith.config.zero import ZeroOptimization
from zerolith.partitioning import SHARD, Partitioning


class Note(NamedTuple):
    """A key that was accepted and has no effect."""

    path: str
    why: str
    is_mistake: bool = False  # whoever wrote it expects an effect


class Optimizer(Section):
    """The optimizer to build when the caller passes none."""

    type: Annotated[Name, Field(description="Optimizer to build: one of ours or a class of torch.optim.")]
    # Any: the optimizer's constructor checks them
    params: dict[str, Any] = key({}, "Its keyword arguments, such as lr and weight_decay.")

    @model_validator(mode="after")
    def _clipping_lives_elsewhere(self) -> "Optimizer":
        if "max_grad_norm" in self.params:
            raise ValueError("optimizer.params.max_grad_norm is not ours; move its value to gradient_clipping")
        return self


class Scheduler(Section):
    """The LR schedule to build when the caller passes none."""

    type: Annotated[Name, Field(description="LR schedule to build: one of ours or of torch.optim.lr_scheduler.")]
    # Any: the schedule's constructor checks them
    params: dict[str, Any] = key({}, "Its keyword arguments, such as warmup_num_steps.")


class FP16(Section):
    """Half precision with loss scaling."""

    enabled: bool = key(False, "Compute in float16 with fp32 master weights.")
    auto_cast: bool = key(False, "Cast floating-point inputs of the model to float16.")
    loss_scale: float = key(0.0, "Fixed loss scale; 0 adapts it while training.", ge=0)
    initial_scale_power: int = key(16, "The first adaptive scale is 2 ** this.", ge=0, le=126)
    loss_scale_window: Count = key(1000, "Steps without overflow before the scale doubles.")
    hysteresis: CountOrZero = key(2, "Overflows until the scale halves.")
    consecutive_hysteresis: bool = key(False, "Refill hysteresis after every good step.")
    min_loss_scale: float = key(1.0, "The adaptive scale never falls below this.", gt=0)


class BF16(Section):
    """Brain-float precision; `bfloat16` is another name of this section."""

    enabled: bool = key(False, "Compute in bfloat16 with fp32 master weights.")
    check_grad_overflow: bool = key(True, "Skip a step whose gradients hold Inf or NaN.")
    split_master: bool = key(False, "Keep of masters the 16 bits that weights lack: 2 bytes less for each, same bits.")


class TorchAutocast(Section):
    """PyTorch's own mixed precision."""

    enabled: bool = key(False, "Keep fp32 parameters; run forward under torch.autocast.")
    dtype: Literal["bfloat16", "float16"] | None = key(None, "Autocast dtype; null is torch's default for the device.")


class DataTypes(Section):
    """Dtypes of what is kept between micro-batches."""

    grad_accum_dtype: ShortDtype | None = key(None, "Dtype in which gradients add up over micro-batches; null is fp32.")


class ActivationCheckpointing(Section):
    """What of a block's activations is computed again in backward."""

    policy: Literal["none", "selective", "full"] = key(
        "none", "Compute again: nothing, all but matrix products and attention, everything."
    )
    classes: Names = key((), "Class names of the blocks; none means the repeated modules of a container.")
    every: Count = key(1, "Treat every k-th block so.")
    cpu_checkpointing: bool = key(False, "Keep what checkpointed blocks keep in host memory.")


class TensorBoard(Section):
    """TensorBoard events of each step, by rank 0."""

    enabled: bool = key(False, "Write them.")
    output_path: str = key("", "Folder of all jobs; empty means runs.")
    job_name: str = key("DeepSpeedJobName", "Folder of this job in it.")


class CsvMonitor(Section):
    """CSV files of each step's numbers, by rank 0."""

    enabled: bool = key(False, "Write them.")
    output_path: str = key("", "Folder of all jobs; empty means runs.")
    job_name: str = key("DeepSpeedJobName", "Folder of this job in it.")


class Wandb(Section):
    """A run of Weights & Biases, by rank 0; the environment variable WANDB_MODE=offline keeps it here."""

    enabled: bool = key(False, "Write it.")
    group: str | None = key(None, "Its group.")
    team: str | None = key(None, "The team that it belongs to.")
    project: str = key("deepspeed", "Its project.")


class CommsLogger(Section):
    """Counting and timing of collectives."""

    enabled: bool = key(False, "Time every collective; rank 0 logs a table at the end.")


class FlopsProfiler(Section):
    """Counting a step's floating-point operations."""

    enabled: bool = key(False, "Count those of one step, and log them with the speed of the next.")
    profile_step: Count = key(1, "Which optimizer step, counted from 1.")
    module_depth: int = key(-1, "How deep into the modules the table goes; -1 is all the way.", ge=-1)
    detailed: bool = key(True, "Add the table by module.")
    output_file: str | None = key(None, "File for the table; null logs it.")


class Preempted(Section):
    """Leaving in good order when the job is told to end."""

    enabled: bool = key(False, "On SIGTERM finish the step, save to checkpoint.folder and exit with status 0.")
    deadline_s: Count = key(300, "Seconds after SIGTERM when the process ends all the same, with status 124.")


class Checkpoint(Section):
    """Where, how and for how long a run is kept on disk."""

    folder: str = key("", "Where checkpoints go unless a call says otherwise; tried out and locked at start-up.")
    async_save: bool = key(False, "Write behind the training, which waits for a copy in memory only.")
    when_busy: Literal["wait", "drop"] = key("wait", "What a save does while the one before it is being written.")
    keep_last: Count | None = key(None, "So many of the newest global_step<N> stay; null keeps all.")
    keep_every: Count | None = key(None, "With keep_last: those of steps that this divides stay, too.")
    verify_after_save: bool = key(False, "Read everything back from the disk and compare before a save counts.")
    writer_threads: CountOrZero = key(1, "Threads of a rank that compute checksums beside the one that writes.")
    on_damage: Literal["raise", "previous"] = key(
        "raise", "What loading without a tag does with a damaged checkpoint: stop, or take the one before it."
    )
    preemption: Preempted = Preempted()

    @model_validator(mode="after")
    def _preempted_somewhere(self) -> "Checkpoint":
        if self.preemption.enabled and not self.folder:
            raise ValueError("checkpoint.preemption needs checkpoint.folder to save to")
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("checkpoint.keep_every has an effect only with checkpoint.keep_last")
        return self


class TraceSteps(Section):
    """A trace of some optimizer steps, counted from 1, by torch's profiler."""

    first_step: Count | None = key(None, "The first; null traces nothing.")
    last_step: Count | None = key(None, "The last; null is the first.")
    folder: str = key("runs/trace", "Where each rank writes its file.")


class Zerolith(Section):
    """What only zerolith knows."""

    trace: TraceSteps = TraceSteps()
    log_format: Literal["plain", "json", "rich"] = key(
        "plain", "What rank 0 logs: as logging is set up, JSON lines, or lines and a bar by rich; these two on stderr."
    )
    peak_tflops: float | None = key(None, "TFLOP/s that a device can make at most; null looks its name up.", gt=0)

    unit_classes: Names = key((), "Class names whose instances each form a unit.")
    dataloader_workers: CountOrZero = key(0, "Processes that fetch the batches of training_data ahead of their use.")


class Config(Section):
    """Everything that a run is told, checked; `resolve_batch` fills the three batch numbers."""

    train_batch_size: Count | None = key(None, "Samples per optimizer step over all ranks.")
    train_micro_batch_size_per_gpu: Count | None = key(None, "Samples per rank in one forward and backward.")
    gradient_accumulation_steps: Count | None = key(None, "Micro-batches per rank in one optimizer step.")
    managed_gradient_accumulation: bool = key(True, "Count micro-batches; if false, every step() updates.")
    gradient_allreduce_op: Literal["mean", "sum"] = key("mean", "Whether gradients of ranks are averaged or added up.")
    prescale_gradients: bool = key(False, "Divide gradients by gradient_predivide_factor before they travel.")
    gradient_predivide_factor: float = key(1.0, "Divisor before the reduction; the rest is divided after it.", gt=0)
    gradient_clipping: float = key(1.0, "Scale gradients down to this global 2-norm; 0 does not clip.", ge=0)
    communication_data_type: ShortDtype | None = key(None, "Dtype of gradients on the wire; null is the compute dtype.")
    steps_per_print: StepsOrNever = key(None, "Optimizer steps between progress lines; null and Infinity print none.")
    wall_clock_breakdown: bool = key(False, "Time forward, backward, step and collectives; log them with each step.")
    dataloader_drop_last: bool = key(False, "Drop a last batch that is not full.")
    reproducible: bool = key(False, "The same bits at every stage and world size, at some cost in speed.")
    fingerprint_interval: CountOrZero = key(1, "Optimizer steps between checks that ranks communicate alike; 0 is off.")
    integrity_interval: CountOrZero = key(
        0, "Optimizer steps between checks that replicas agree and memory keeps its bits; 0 is off."
    )
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    fp16: FP16 = FP16()
    bf16: BF16 = BF16()
    torch_autocast: TorchAutocast = TorchAutocast()
    data_types: DataTypes = DataTypes()
    zero_optimization: ZeroOptimization = ZeroOptimization()
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    checkpoint: Checkpoint = Checkpoint()
    tensorboard: TensorBoard = TensorBoard()
    csv_monitor: CsvMonitor = CsvMonitor()
    wandb: Wandb = Wandb()
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    zerolith: Zerolith = Zerolith()

    _raw: Mapping[str, Any] = {}  # as the user gave it: any JSON
    _notes: tuple[Note, ...] = ()

    @model_validator(mode="after")
    def _one_precision(self) -> "Config":
        modes = ("fp16", "bf16", "torch_autocast")
        chosen = [f"{mode}.enabled" for mode in modes if getattr(self, mode).enabled]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are set together; a run has one precision, keep one")
        return self

    @model_validator(mode="after")
    def _splits_what_is_here(self) -> "Config":
        if self.bf16.split_master and not self.bf16.enabled:
            raise ValueError("bf16.split_master splits the masters of bf16 weights; set bf16.enabled")
        zero, message = self.zero_optimization, "bf16.split_master keeps masters beside the weights, and "
        if self.bf16.split_master and zero.offload_optimizer.device == "nvme":
            raise ValueError(
                f'{message}zero_optimization.offload_optimizer parts them; choose one, or its device "cpu"'
            )
        if self.bf16.split_master and zero.offload_param.device != "none":
            raise ValueError(f"{message}zero_optimization.offload_param parts them; choose one")
        return self

    @model_validator(mode="after")
    def _updates_in_backward(self) -> "Config":
        zero, name = self.zero_optimization, 'zero_optimization.offload_optimizer.overlap: "backward" '
        if zero.offload_optimizer.overlap != "backward":
            return self
        if Partitioning.from_stage(zero.stage).optim is not SHARD:
            raise ValueError(f"{name}updates shards; choose stage 1, 2 or 3")
        if not self.managed_gradient_accumulation:
            raise ValueError(
                f"{name}must know which backward is a step's last; leave managed_gradient_accumulation true"
            )
        if self.integrity_interval:
            raise ValueError(f"{name}changes what integrity_interval compares before a step; choose one of the two")
        return self

    @model_validator(mode="after")
    def _predivides_when_told(self) -> "Config":
        if self.gradient_predivide_factor != 1.0 and not self.prescale_gradients:
            raise ValueError("gradient_predivide_factor has an effect only with prescale_gradients: true")
        return self

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's signature
        if context:
            self._raw, self._notes = context

    @property
    def may_change_steps(self) -> bool:
        """Whether the norm of all gradients, or a loss scale, decides what becomes of a step."""
        is_fp16 = self.fp16.enabled or (self.torch_autocast.enabled and self.torch_autocast.dtype == "float16")
        return self.gradient_clipping > 0 or is_fp16

    @property
    def skips_steps(self) -> bool:
        """Whether a step is skipped if a gradient is not finite."""
        return not self.bf16.enabled or self.bf16.check_grad_overflow

    @property
    def raw(self) -> Mapping[str, Any]:
        """The keys as given: the caller's own dict, or what its file holds."""
        return self._raw

    @property
    def notes(self) -> tuple[Note, ...]:
        """Keys that were given, accepted and without effect, in the order given."""
        return self._notes

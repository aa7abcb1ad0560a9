"""The keys that zerolith acts on, as frozen sections. What is said of each here is its documentation."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

MAX_INT = 2**63 - 1
MOE_BLOCKS = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)


class Note(NamedTuple):
    """A key that was accepted and has no effect."""

    path: str
    why: str


class Provenance(NamedTuple):
    """Where a Config comes from."""

    raw: Mapping[str, Any]  # as the user gave it: any JSON
    notes: tuple[Note, ...]


def _integral(value: object) -> object:
    """JSON has no integer exponents: 5e8 arrives as a float and means 500000000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _infinite_is_never(value: object) -> object:
    return None if isinstance(value, float) and value == math.inf else value


def doc(text: str, **bounds: int) -> Any:  # Any: pydantic's FieldInfo, which only pydantic reads
    """A field's documentation and bounds."""
    return Field(description=text, **bounds)  # type: ignore[call-overload]  # `bounds` are ge, gt, le


Count = Annotated[int, Field(gt=0, le=MAX_INT)]
Elements = Annotated[int, Field(ge=0, le=MAX_INT), BeforeValidator(_integral)]
SomeElements = Annotated[int, Field(gt=0, le=MAX_INT), BeforeValidator(_integral)]
Stage = Annotated[int, Field(ge=0, le=3)]  # a Literal would take True for 1
StepsOrNever = Annotated[Count | None, BeforeValidator(_infinite_is_never)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # JSON has lists where we keep tuples
Name = Annotated[str, Field(min_length=1)]
ShortDtype = Literal["fp16", "bf16", "fp32"]


class Section(BaseModel):
    """A JSON object with known keys only; bools are not ints and 8.0 is not 8."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Optimizer(Section):
    """The optimizer to build when the caller passes none."""

    type: Annotated[Name, doc("Optimizer to build: one of ours or a class of torch.optim.")]
    params: Annotated[dict[str, Any], doc("Its keyword arguments, such as lr and weight_decay.")] = Field(
        default_factory=dict  # Any: the optimizer's constructor checks them
    )

    @model_validator(mode="after")
    def _clipping_lives_elsewhere(self) -> "Optimizer":
        if "max_grad_norm" in self.params:
            raise ValueError("optimizer.params.max_grad_norm is not ours; move its value to gradient_clipping")
        return self


class Scheduler(Section):
    """The LR schedule to build when the caller passes none."""

    type: Annotated[Name, doc("LR schedule to build: one of ours or of torch.optim.lr_scheduler.")]
    params: Annotated[dict[str, Any], doc("Its keyword arguments, such as warmup_num_steps.")] = Field(
        default_factory=dict  # Any: the schedule's constructor checks them
    )


class FP16(Section):
    """Half precision with loss scaling."""

    enabled: Annotated[bool, doc("Compute in float16 with fp32 master weights.")] = False
    auto_cast: Annotated[bool, doc("Cast floating-point inputs of the model to float16.")] = False
    loss_scale: Annotated[float, doc("Fixed loss scale; 0 adapts it while training.", ge=0)] = 0.0
    initial_scale_power: Annotated[int, doc("The first adaptive scale is 2 ** this.", ge=0, le=126)] = 16
    loss_scale_window: Annotated[Count, doc("Steps without overflow before the scale doubles.")] = 1000
    hysteresis: Annotated[int, doc("Overflows until the scale halves.", ge=0, le=MAX_INT)] = 2
    consecutive_hysteresis: Annotated[bool, doc("Refill hysteresis after every good step.")] = False
    min_loss_scale: Annotated[float, doc("The adaptive scale never falls below this.", gt=0)] = 1.0


class BF16(Section):
    """Brain-float precision; `bfloat16` is another name of this section."""

    enabled: Annotated[bool, doc("Compute in bfloat16 with fp32 master weights.")] = False
    check_grad_overflow: Annotated[bool, doc("Skip a step whose gradients hold Inf or NaN.")] = True


class TorchAutocast(Section):
    """PyTorch's own mixed precision."""

    enabled: Annotated[bool, doc("Keep fp32 parameters; run forward under torch.autocast.")] = False
    dtype: Annotated[
        Literal["bfloat16", "float16"] | None, doc("Autocast dtype; null is torch's default for the device.")
    ] = None


class DataTypes(Section):
    """Dtypes of what is kept between micro-batches."""

    grad_accum_dtype: Annotated[
        ShortDtype | None, doc("Dtype in which gradients add up over micro-batches; null is fp32.")
    ] = None


class LeafModule(Section):
    """Modules gathered as one piece at stage 3."""

    classes: Annotated[Names, doc("Classes gathered whole with all inside; absent ones are no error.")] = MOE_BLOCKS
    names: Annotated[Names, doc("Module paths gathered whole.")] = ()
    name_suffixes: Annotated[Names, doc("Endings of module paths gathered whole.")] = ()


class ZeroOptimization(Section):
    """What is sharded, and in what pieces; `true` is stage 1."""

    stage: Annotated[
        Stage,
        doc("What is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."),
    ] = 0
    reduce_bucket_size: Annotated[SomeElements, doc("Most gradient elements in one reduction.")] = 500_000_000
    overlap_comm: Annotated[bool | None, doc("Communicate while computing; null: at stage 3 only.")] = None
    stage3_prefetch_bucket_size: Annotated[
        Elements, doc("Elements gathered ahead of their use at stage 3; 0 gathers nothing ahead.")
    ] = 50_000_000
    stage3_param_persistence_threshold: Annotated[
        Elements, doc("Parameters with fewer elements than this stay whole at stage 3.")
    ] = 100_000
    stage3_gather_16bit_weights_on_model_save: Annotated[
        bool, doc("Allow a whole 16-bit copy of the weights to be gathered for saving at stage 3.")
    ] = False
    leaf_module: LeafModule = LeafModule()


class Zerolith(Section):
    """What only zerolith knows."""

    unit_classes: Annotated[Names, doc("Class names whose instances each form a unit.")] = ()


class Config(Section):
    """Everything that a run is told, checked; `resolve_batch` fills the three batch numbers."""

    train_batch_size: Annotated[Count | None, doc("Samples per optimizer step over all ranks.")] = None
    train_micro_batch_size_per_gpu: Annotated[Count | None, doc("Samples per rank in one forward and backward.")] = None
    gradient_accumulation_steps: Annotated[Count | None, doc("Micro-batches per rank in one optimizer step.")] = None
    gradient_clipping: Annotated[float, doc("Scale gradients down to this global 2-norm; 0 does not clip.", ge=0)] = 1.0
    communication_data_type: Annotated[
        ShortDtype | None, doc("Dtype of gradients on the wire; null is the compute dtype.")
    ] = None
    steps_per_print: Annotated[
        StepsOrNever, doc("Optimizer steps between progress lines; null and Infinity print none.")
    ] = None
    dataloader_drop_last: Annotated[bool, doc("Drop a last batch that is not full.")] = False
    reproducible: Annotated[bool, doc("The same bits at every stage and world size, at some cost in speed.")] = False
    fingerprint_interval: Annotated[
        int, doc("Optimizer steps between checks that ranks communicate alike; 0 is off.", ge=0, le=MAX_INT)
    ] = 1
    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    fp16: FP16 = FP16()
    bf16: BF16 = BF16()
    torch_autocast: TorchAutocast = TorchAutocast()
    data_types: DataTypes = DataTypes()
    zero_optimization: ZeroOptimization = ZeroOptimization()
    zerolith: Zerolith = Zerolith()

    _provenance: Provenance = PrivateAttr(default_factory=lambda: Provenance({}, ()))

    @model_validator(mode="after")
    def _one_precision(self) -> "Config":
        modes = {
            "fp16.enabled": self.fp16.enabled,
            "bf16.enabled": self.bf16.enabled,
            "torch_autocast.enabled": self.torch_autocast.enabled,
        }
        chosen = [path for path, enabled in modes.items() if enabled]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are set together; a run has one precision, keep one")
        return self

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's signature
        if isinstance(context, Provenance):
            self._provenance = context

    @property
    def raw(self) -> Mapping[str, Any]:
        """The keys as given: the caller's own dict, or what its file holds."""
        return self._provenance.raw

    @property
    def notes(self) -> tuple[Note, ...]:
        """Keys that were given, accepted and without effect, in the order given."""
        return self._provenance.notes

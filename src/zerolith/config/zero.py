"""The section zero_optimization: what is sharded, in what pieces, and where it rests."""

import math
from typing import Literal

from pydantic import model_validator

from zerolith.config.section import Elements, Names, Section, Share, SomeElements, Stage, key
from zerolith.partitioning import SHARD, Partitioning

MOE_BLOCKS = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)


class LeafModule(Section):
    """Modules gathered as one piece at stage 3."""

    classes: Names = key(MOE_BLOCKS, "Classes gathered whole with all inside; absent ones are no error.")
    names: Names = key((), "Module paths gathered whole.")
    name_suffixes: Names = key((), "Endings of module paths gathered whole.")


class OffloadOptimizer(Section):
    """Where masters and optimizer states rest, and where they are stepped."""

    device: Literal["none", "cpu", "nvme"] = key(
        "none", "none: on the device; cpu: in host memory, stepped there; nvme: in a file, stepped in host memory."
    )
    nvme_path: str | None = key(None, "Folder on a fast disk of each host, for device nvme.")
    overlap: Literal["none", "forward", "backward"] | None = key(
        None,
        "When updates run. forward: behind the next forward, which waits for each unit's; backward: from when a unit's "
        "gradient is complete, whose memory then goes unless clipping or a loss scale may have the update taken back; "
        "none: in step(); null: forward at stage 3, none at 1 and 2.",
    )
    ratio: Share = key(1.0, "Share of masters and states that is offloaded; those of the model's first units stay.")
    hbm_first: bool = key(
        True, "With device cpu and without a ratio: measure the device's memory in training, and fill it with states."
    )


class OffloadParam(Section):
    """Where shards of weights rest at stage 3 while no forward or backward needs them."""

    device: Literal["none", "cpu", "nvme"] = key(
        "none", "none: on the device; cpu: in host memory; nvme: in a file of each rank."
    )
    nvme_path: str | None = key(None, "Folder on a fast disk of each host, for device nvme.")


class ZeroOptimization(Section):
    """What is sharded, and in what pieces; `true` is stage 1."""

    stage: Stage = key(0, "What is sharded: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too.")
    reduce_bucket_size: SomeElements = key(500_000_000, "Most gradient elements in one reduction.")
    overlap_comm: bool | None = key(None, "Communicate while computing; null: at stage 3 only.")
    stage3_prefetch_bucket_size: Elements = key(
        50_000_000, "Elements gathered ahead of their use at stage 3; 0 gathers nothing ahead."
    )
    stage3_param_persistence_threshold: Elements = key(
        100_000, "Parameters with fewer elements than this stay whole at stage 3."
    )
    stage3_max_live_parameters: Elements = key(
        0, "Parameters that stay whole from their first use after a step to the next one at stage 3."
    )
    stage3_gather_16bit_weights_on_model_save: bool = key(
        False, "Allow a whole 16-bit copy of the weights to be gathered for saving at stage 3."
    )
    leaf_module: LeafModule = LeafModule()
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    offload_param: OffloadParam = OffloadParam()

    def partitioning(self, *, reproducible: bool = False) -> Partitioning:
        """Where parameters, gradients and optimizer states rest."""
        return Partitioning.from_stage(self.stage, reproducible=reproducible, rests_sharded=self.rests_sharded)

    @property
    def max_live_numel(self) -> float:
        """Elements that stay whole until the step, if parameters rest as shards."""
        return math.inf if self.rests_sharded else self.stage3_max_live_parameters

    @property
    def rests_sharded(self) -> bool:
        """Whether parameters rest as shards between step and forward at stages that would leave them whole."""
        offload = self.offload_optimizer
        is_behind = offload.overlap == "forward" and offload.device != "none"
        return is_behind and Partitioning.from_stage(self.stage).shards_states_only

    @model_validator(mode="after")
    def _offloads_shards(self) -> "ZeroOptimization":
        partitioning = Partitioning.from_stage(self.stage)
        if self.offload_optimizer.device != "none" and partitioning.optim is not SHARD:
            raise ValueError("zero_optimization.offload_optimizer moves shards; choose stage 1, 2 or 3")
        if self.offload_param.device != "none" and partitioning.params is not SHARD:
            raise ValueError("zero_optimization.offload_param moves shards of weights; choose stage 3")
        for name, offload in (("offload_optimizer", self.offload_optimizer), ("offload_param", self.offload_param)):
            if offload.device == "nvme" and not offload.nvme_path:
                raise ValueError(f"zero_optimization.{name}.nvme_path: device nvme needs a folder")
        return self

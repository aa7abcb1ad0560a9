"""Parameters at rest: what a stand-in tells and what it refuses; and that nothing written to weights is lost."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness import run_ranks
from models import differing, sgd, start_engine, whole_weights, zero_config
from unusual import CASES, Chain
from zerolith.errors import ShardedAccessError
from zerolith.layout import Range
from zerolith.parameter import ShardedParameter, refuse
from zerolith.zero import safe_get_full_fp32_param

STAGES = (0, 1, 2, 3)
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


def engine_for(stage: int, make_optimizer: Any = sgd, *, model: nn.Module | None = None, **overrides: Any) -> Any:
    torch.manual_seed(0)
    config = zero_config(stage, zero_optimization={"stage3_param_persistence_threshold": 20}, **overrides)
    return start_engine(model or Chain(), config, make_optimizer)


def train(engine: Any, steps: int = 1) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in range(steps):
        generator = torch.Generator().manual_seed(step + 10 * engine.global_rank)
        x = torch.randn(3, 8, generator=generator).to(dtype)
        engine.backward(engine(x, step, engine.global_rank))
        engine.step()


def stand_in() -> ShardedParameter:
    return ShardedParameter(
        torch.Size((4, 3)), torch.arange(5.0), Range(2, 7), fqn="block.weight", touch=refuse, requires_grad=True
    )


# --- what a stand-in tells --------------------------------------------------------------------------


def test_a_stand_in_tells_what_a_parameter_tells() -> None:
    param = stand_in()
    assert isinstance(param, nn.Parameter)
    assert (param.shape, param.ndim, param.size(1), len(param)) == ((4, 3), 2, 3, 4)
    assert (param.numel(), param.nbytes, param.dtype, param.device.type) == (12, 48, torch.float32, "cpu")
    assert (param.requires_grad, param.is_leaf, param.grad, param.is_floating_point()) == (True, True, None, True)
    assert param.stride() == (3, 1)
    assert param.is_contiguous()
    assert "block.weight" in repr(param)
    assert "[2:7]" in repr(param)
    assert param in {param: 1}
    assert not param.requires_grad_(False).requires_grad
    param.requires_grad = True
    assert param.requires_grad


USES: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda param: param + 1,
    "reflected": lambda param: 2 * param,
    "comparison": lambda param: param == 0,
    "method": lambda param: param.sum(),
    "function": lambda param: torch.sum(param),
    "nn.functional": lambda param: F.linear(torch.ones(1, 3), param),
    "list of tensors": lambda param: torch.stack([torch.ones(4, 3), param]),
    "matmul": lambda param: torch.ones(1, 4) @ param,
    "indexing": lambda param: param[0],
    "assignment": lambda param: param.__setitem__(0, 1.0),
    "view": lambda param: param.view(-1),
    "transpose": lambda param: param.T,
    "in place": lambda param: param.mul_(2),
    "init": lambda param: nn.init.normal_(param),
    "data": lambda param: param.data,
    "data_ptr": lambda param: param.data_ptr(),
    "cast": lambda param: param.to(torch.float64),
    "clone": lambda param: param.clone(),
    "item": lambda param: param.tolist(),
    "numpy": lambda param: param.numpy(),
    "iteration": lambda param: list(param),
    "as output": lambda param: torch.add(torch.ones(4, 3), 1, out=param),
    "as source": lambda param: torch.zeros(4, 3).copy_(param),
    "torch.save": lambda param: torch.save({"weight": param}, io.BytesIO()),
    "pickle": lambda param: pickle.dumps(param),
    "detached": lambda param: param.detach() + 1,
    "below torch functions": lambda param: torch.ops.aten.add.Tensor(param, 1),
}


@pytest.mark.parametrize("use", USES)
def test_computing_with_a_stand_in_is_refused_by_name(use: str) -> None:
    with torch.no_grad(), pytest.raises(ShardedAccessError, match=r"'block\.weight' is sharded"):
        USES[use](stand_in())


def test_each_rank_takes_its_own_part_of_what_is_copied_into_a_stand_in() -> None:
    param = stand_in()
    param.detach().copy_(torch.arange(12.0).view(4, 3) * 10)
    assert param.local.tolist() == [20.0, 30.0, 40.0, 50.0, 60.0]
    with pytest.raises(ShardedAccessError, match=r"shape \(4, 3\).*shape \(3, 4\)"):
        param.copy_(torch.zeros(3, 4))
    other = ShardedParameter(torch.Size((4, 3)), torch.zeros(3), Range(0, 3), fqn="other", touch=refuse)
    with pytest.raises(ShardedAccessError, match="sharded differently"):
        param.copy_(other)


def test_a_copy_of_a_stand_in_has_memory_of_its_own() -> None:
    param = stand_in()
    duplicate = copy.deepcopy(param)
    duplicate.local.zero_()
    assert param.local.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert (duplicate.fqn, duplicate.owned, duplicate.requires_grad) == (param.fqn, param.owned, True)


# --- in a model -------------------------------------------------------------------------------------


def model_at_rest() -> dict[str, Any]:
    model = Chain()
    kept = model.layers[1].inner.weight  # as code keeps it that looks parameters up once
    engine = engine_for(3, model=model)
    engine.module.layers[0].inner.weight.requires_grad_(False)
    train(engine)
    weight = engine.module.layers[1].inner.weight
    with pytest.raises(ShardedAccessError) as caught:
        weight.sum()
    return {
        "kinds": {type(param) for param in engine.module.parameters()},
        "numel": sum(param.numel() for param in engine.module.parameters()),
        "error": str(caught.value),
        "frozen": [name for name, param in engine.module.named_parameters() if not param.requires_grad],
        "state": list(engine.module.state_dict()) == list(Chain().state_dict()),
        "kept": (tuple(engine.module.layers[2].inner.weight.shape), kept.shape == weight.shape),
        "same": differing(whole_weights(engine), whole_weights(engine)),
    }


def test_a_model_at_rest_at_stage_3_has_stand_ins_of_the_true_shapes() -> None:
    for seen in run_ranks(2, model_at_rest):
        assert seen["kinds"] == {ShardedParameter}
        assert seen["numel"] == sum(param.numel() for param in Chain().parameters())
        assert "'layers.1.inner.weight' is sharded" in seen["error"]
        assert "GatheredParameters" in seen["error"]
        assert seen["frozen"] == ["layers.0.inner.weight"]
        assert seen["state"]
        assert seen["kept"] == ((8, 8), True)
        assert seen["same"] == []


def read_a_parameter_that_was_kept() -> list[bool]:
    torch.manual_seed(0)
    engine = engine_for(3)
    unit = engine._sharded.units[1]
    unit.gather()
    (name, param), *_ = [(member.name, member.param) for member in unit.sections[0].members]
    whole = bool(torch.isfinite(param).all())
    unit.release()
    at_rest = bool(torch.isnan(param).all())
    unit.gather()
    return [whole, at_rest, bool(torch.isfinite(param).all()), name == "layers.0.gain"]


def test_a_parameter_object_that_code_kept_reads_as_nan_at_rest_and_does_not_crash() -> None:
    assert run_ranks(2, read_a_parameter_that_was_kept) == [[True] * 4] * 2


# --- nothing written is lost ------------------------------------------------------------------------


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([param for param in model.parameters() if param.ndim == 2], lr=0.1)


OPTIMIZERS: dict[str, Any] = {"SGD": sgd, "Muon": muon}


def stop_learning(engine: Any) -> None:
    for group in engine.optimizer.param_groups:
        group.update(lr=0.0, weight_decay=0.0)


def load_and_step(stage: int, precision: str, optimizer: str, when: str) -> list[str]:
    """What differs from the loaded values after a step that changes nothing."""
    engine = engine_for(stage, OPTIMIZERS[optimizer], **PRECISIONS[precision])
    train(engine, 2)
    torch.manual_seed(42)
    loaded = {name: torch.randn(value.shape) for name, value in Chain().state_dict().items()}
    if when == "after a forward":
        dtype = next(engine.module.parameters()).dtype
        engine(torch.ones(3, 8, dtype=dtype), 0, 0)  # with gradients, so the root is kept whole for a backward
    engine.module.load_state_dict(loaded)
    stop_learning(engine)
    train(engine, 2)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    complaints = differing(whole_weights(engine), {name: value.to(dtype) for name, value in loaded.items()})
    for name, param in engine.module.named_parameters():
        if optimizer == "SGD" and not torch.equal(safe_get_full_fp32_param(param), loaded[name].to(dtype).float()):
            complaints.append(f"master of {name}")
    return complaints


@pytest.mark.parametrize("when", ["at rest", "after a forward"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_masters_follow_a_loaded_state_dict_at_every_stage(precision: str, optimizer: str, when: str) -> None:
    for complaints in run_ranks(
        2, lambda: {stage: load_and_step(stage, precision, optimizer, when) for stage in STAGES}
    ):
        assert complaints == {stage: [] for stage in STAGES}


def edit_one(stage: int) -> dict[str, Any]:
    engine = engine_for(stage, **PRECISIONS["bf16"])
    train(engine, 2)
    before = {name: safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}
    state = {"layers.0.gain": torch.tensor(0.5)}
    engine.module.load_state_dict(state, strict=False)
    stop_learning(engine)
    train(engine)
    after = {name: safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}
    return {"differ": differing(after, before), "value": after["layers.0.gain"].item()}


@pytest.mark.parametrize("stage", STAGES)
def test_an_edit_of_one_weight_does_not_round_the_masters_of_others(stage: int) -> None:
    assert run_ranks(2, edit_one, stage) == [{"differ": ["layers.0.gain"], "value": 0.5}] * 2


def scale_in_place(stage: int) -> list[str]:
    engine = engine_for(stage, **PRECISIONS["bf16"])
    train(engine, 2)
    before = whole_weights(engine)
    with torch.no_grad():
        for param in engine.module.parameters():
            param.mul_(0.5)
    stop_learning(engine)
    train(engine)
    return differing(whole_weights(engine), {name: value * 0.5 for name, value in before.items()})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_edits_in_place_between_steps_are_kept(stage: int) -> None:
    assert run_ranks(2, scale_in_place, stage) == [[], []]


class Clamps(Chain):
    """Edits its own weights in forward, some of them at every call and some now and then."""

    def hidden(self, x: Tensor, step: int, rank: int) -> Tensor:
        with torch.no_grad():
            self.head.weight.clamp_(-0.2, 0.2)
            if step == 1:
                self.layers[1].outer.weight.mul_(0.5)
        return super().hidden(x, step, rank)


def edits_in_forward(precision: str) -> list[str]:
    torch.manual_seed(0)
    first, complaints = None, []
    for stage in STAGES:
        engine = engine_for(stage, model=Clamps(), **PRECISIONS[precision])
        train(engine, 4)
        stop_learning(engine)
        train(engine, 1)
        got = whole_weights(engine)
        first = first or got
        assert got["head.weight"].abs().max() <= 0.2005
        complaints += [f"{name} at stage {stage}" for name in differing(got, first)]
    return complaints


@pytest.mark.parametrize("precision", PRECISIONS)
def test_edits_that_a_forward_makes_are_kept_at_every_stage(precision: str) -> None:
    assert run_ranks(2, edits_in_forward, precision) == [[], []]


def half_precision_norms(stage: int) -> list[str]:
    engine = engine_for(stage, model=CASES["norms"](), **PRECISIONS["bf16"])
    train(engine, 2)
    return [
        str(buffer.dtype)
        for buffer in (
            engine.module.norms[0].running_mean,
            engine.module.norms[0].num_batches_tracked,
            engine.module.shift,
        )
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_buffers_follow_the_dtype_of_the_parameters_beside_them(stage: int) -> None:
    """`shift` belongs to a module without parameters of its own, as rotary frequencies do."""
    assert run_ranks(1, half_precision_norms, stage) == [["torch.bfloat16", "torch.int64", "torch.float32"]]

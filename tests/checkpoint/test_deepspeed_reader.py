"""Checkpoints that DeepSpeed wrote are read bit for bit; what is missing, damaged or not supported is named.

fixtures/deepspeed.tar.xz holds the checkpoints and the truth; make_deepspeed_fixtures.py made them.
"""

from __future__ import annotations

import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

from saved_runs import unpack
from zerolith.checkpoint.deepspeed import DeepSpeedCheckpoint, Unknown, read_deepspeed, read_torch_file
from zerolith.checkpoint.deepspeed.plain import load_tensors, meaning
from zerolith.errors import CheckpointDamagedError, CheckpointError

ARCHIVE = Path(__file__).parent / "fixtures" / "deepspeed.tar.xz"
with tarfile.open(ARCHIVE) as _archive:
    CASES = sorted(name for name in _archive.getnames() if "/" not in name)
WEIGHTS, WEIGHTS_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, unpacked. Not to be changed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    unpack(ARCHIVE, folder)
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that gives the folder of one case, to be changed."""
    return lambda name: Path(shutil.copytree(home / name, tmp_path / name))


def truth_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "truth.pt", weights_only=True)


def same(left: Tensor, right: Tensor) -> bool:
    left, right = left.contiguous(), right.contiguous()
    return (left.dtype, left.shape) == (right.dtype, right.shape) and torch.equal(
        left.view(-1).view(torch.uint8), right.view(-1).view(torch.uint8)
    )


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Load the file, edit what is in it, and save it again."""
    content = without_objects(load_tensors(read_torch_file(path), where=path))
    edit(content)
    torch.save(content, path)


def without_objects(value: Any) -> Any:
    """Objects of DeepSpeed's classes as the numbers that they stand for, or nothing: DeepSpeed is not here."""
    if isinstance(value, dict):
        return {key: without_objects(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_objects(each) for each in value]
    return meaning(value) if not isinstance(meaning(value), Unknown) else None


# --- what is read is what DeepSpeed had -------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_states_are_read_bit_for_bit(case: str, home: Path) -> None:
    found, truth = read_deepspeed(home / case), truth_of(home / case)
    assert list(found.parameters) == list(truth["values"])
    for name, value in truth["values"].items():
        parameter, states = found.parameters[name], truth["states"].get(name, {})
        assert parameter.shape == value.shape
        assert parameter.trained == (name in truth["states"])
        assert same(parameter.value(), value), name
        assert set(parameter.state) == set(states), name
        assert all(same(parameter.state[key](), state) for key, state in states.items()), name
    found.verify()


@pytest.mark.parametrize("case", CASES)
def test_everything_else_is_read(case: str, home: Path) -> None:
    found, truth = read_deepspeed(home / case, "three"), truth_of(home / case)
    stage, num_ranks, kind = case.split("-")[:3]
    assert (found.zero_stage, found.num_ranks) == (int(stage[1]), int(num_ranks))
    assert (found.step, found.samples, found.skipped_steps) == (3, truth["samples"], 0)
    assert set(found.buffers) == set(truth["buffers"])
    assert all(same(buffer, truth["buffers"][name]) for name, buffer in found.buffers.items())
    assert found.aliases == {"head.weight": "embed.weight"}
    assert [set(group.names or ()) for group in found.param_groups] == [set(names) for names in truth["groups"]]
    assert [group.options["weight_decay"] for group in found.param_groups] == [0.1, 0.0]
    assert 0 < found.param_groups[0].options["lr"] < 0.01
    assert found.scheduler == {"last_batch_iteration": 2}
    assert truth["scale"] is None or found.loss_scale == truth["scale"] == 128
    assert found.client_state.pop("counts").tolist() == [0, 1, 2, 3]
    assert found.client_state == {"epoch": 2, "history": [0.5, None, {"lr": 0.1}]}
    model_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.get(kind)
    assert model_dtype is None or {each.dtype for each in found.parameters.values()} == {model_dtype}


@pytest.mark.parametrize("case", CASES)
def test_steps_of_adam_are_read(case: str, home: Path) -> None:
    # DeepSpeed 0.19.8 makes one step with zero gradients when it wraps the optimizer of stage 0 in bf16 and fp16.
    extra = case.startswith("z0") and case.split("-")[2] != "fp32"
    trained = [each for each in read_deepspeed(home / case).parameters.values() if each.trained]
    expected: dict[str, float] = {} if case.endswith("sgd") else {"step": 4.0 if extra else 3.0}
    assert all(each.scalars == expected for each in trained)


def test_the_folder_of_the_tag_may_be_given(home: Path) -> None:
    assert read_deepspeed(home / "z2-2-fp32" / "three").step == 3
    assert read_deepspeed(str(home / "z2-2-fp32")).home == home / "z2-2-fp32" / "three"


def test_one_piece_is_read_for_one_parameter(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is that of the parameter, not that of a partition."""
    found = read_deepspeed(home / "z1-3-fp32")
    sizes: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **more: sizes.append(args[0]) or empty(*args, **more))
    found.parameters["down.bias"].value()
    assert sizes == [9]


# --- stage 0, whose files name no parameters --------------------------------------------------------


def group_alike(content: dict[str, Any]) -> None:
    """Two groups whose tensors have the same shapes, so that shapes do not tell which is which."""
    states = content["optimizer"]["state"]
    content["module"] = OrderedDict((name, torch.full((3,), float(at))) for at, name in enumerate("abcd"))
    content["buffer_names"] = []
    groups = content["optimizer"]["param_groups"]
    groups[0]["params"], groups[1]["params"] = [0, 1], [2, 3]
    moments = ("exp_avg", "exp_avg_sq")
    content["optimizer"]["state"] = {
        at: {"step": states[0]["step"], **{key: torch.full((3,), 10.0 + at) for key in moments}} for at in range(4)
    }


def test_groups_that_fit_in_several_ways_must_be_named(copy: Callable[[str], Path]) -> None:
    folder = copy("z0-1-fp32")
    change(folder / "three" / WEIGHTS, group_alike)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.*several ways.*group_names"):
        read_deepspeed(folder)
    found = read_deepspeed(folder, group_names=[["a", "d"], ["c", "b"]])
    assert [found.parameters[name].state["exp_avg"]()[0] for name in "abcd"] == [10, 13, 12, 11]
    assert [group.names for group in found.param_groups] == [("a", "d"), ("c", "b")]


def test_the_optimizer_may_be_left_out(copy: Callable[[str], Path]) -> None:
    folder = copy("z0-1-fp32")
    change(folder / "three" / WEIGHTS, group_alike)
    found = read_deepspeed(folder, group_names=[])
    assert [found.parameters[name].value()[0] for name in "abcd"] == [0, 1, 2, 3]
    assert not any(each.trained or each.state for each in found.parameters.values())


def test_an_optimizer_of_named_parameters_needs_no_names(copy: Callable[[str], Path]) -> None:
    def name_them(content: dict[str, Any]) -> None:
        group_alike(content)
        for group, names in zip(content["optimizer"]["param_groups"], (["d", "a"], ["c", "b"]), strict=True):
            group["param_names"] = names

    folder = copy("z0-1-fp32")
    change(folder / "three" / WEIGHTS, name_them)
    found = read_deepspeed(folder)
    assert [found.parameters[name].state["exp_avg"]()[0] for name in "dacb"] == [10, 11, 12, 13]


@pytest.mark.parametrize("case", ["z0-1-fp32", "z0-2-bf16", "z0-1-fused"])
@pytest.mark.parametrize("names", [[["up.weight"], []], [["nobody"], []], [[]], [["gain", "gain"], []]])
def test_names_that_do_not_fit_are_refused(case: str, names: list[list[str]], home: Path) -> None:
    with pytest.raises(CheckpointError, match=WEIGHTS):
        read_deepspeed(home / case, group_names=names)


@pytest.mark.parametrize("case", ["z0-1-fp32", "z0-2-bf16", "z0-2-fp16"])
def test_the_right_names_change_nothing(case: str, home: Path) -> None:
    plain, truth = read_deepspeed(home / case), truth_of(home / case)
    named = read_deepspeed(home / case, group_names=truth["groups"])
    assert [group.names for group in named.param_groups] == [group.names for group in plain.param_groups]


@pytest.mark.parametrize("case", ["z0-2-bf16", "z0-1-fused"])
def test_masters_that_are_not_those_of_the_weights_are_refused(case: str, copy: Callable[[str], Path]) -> None:
    def shift(content: dict[str, Any]) -> None:
        content["module"]["up.weight"].add_(1)

    folder = copy(case)
    change(folder / "three" / WEIGHTS, shift)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.*fit no choice"):
        read_deepspeed(folder)


# --- what is not there, or not of one piece ---------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("case", "name"), [("z1-3-fp32", OPTIMIZER), ("z3-3-bf16", "bf16_" + OPTIMIZER)])
def test_a_missing_optimizer_file_is_named(case: str, name: str, rank: int, copy: Callable[[str], Path]) -> None:
    folder = copy(case)
    (folder / "three" / name.format(rank)).unlink()
    with pytest.raises(CheckpointDamagedError, match=rf"/{name.format(rank)}: it is missing"):
        read_deepspeed(folder)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_missing_weights_file_of_stage_3_is_named(rank: int, copy: Callable[[str], Path]) -> None:
    folder = copy("z3-3-bf16")
    (folder / "three" / WEIGHTS_3.format(rank)).unlink()
    with pytest.raises(CheckpointDamagedError, match=rf"/{WEIGHTS_3.format(rank)}: it is missing"):
        read_deepspeed(folder)


def test_all_optimizer_files_missing_is_not_stage_0(copy: Callable[[str], Path]) -> None:
    for case in ("z1-1-fp32", "z3-1-fp32"):
        folder = copy(case)
        for path in (folder / "three").glob("*optim_states.pt"):
            path.unlink()
        with pytest.raises(CheckpointDamagedError, match=r"the optimizer's files .* are missing"):
            read_deepspeed(folder)


def test_missing_weights_a_missing_tag_and_no_checkpoint_are_named(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("z2-1-fp32")
    with pytest.raises(CheckpointError, match="four"):
        read_deepspeed(folder, "four")
    (folder / "three" / WEIGHTS).unlink()
    with pytest.raises(CheckpointDamagedError, match=WEIGHTS):
        read_deepspeed(folder)
    with pytest.raises(CheckpointError, match="no file 'latest'"):
        read_deepspeed(tmp_path)
    with pytest.raises(CheckpointError, match="absent"):
        read_deepspeed(tmp_path / "absent")


@pytest.mark.parametrize("tag", ["../three", "/etc", "", "a/b", "..", "\0"])
def test_latest_does_not_lead_out_of_the_folder(tag: str, copy: Callable[[str], Path]) -> None:
    folder = copy("z2-1-fp32")
    (folder / "latest").write_text(tag)
    with pytest.raises(CheckpointError):
        read_deepspeed(folder)


def test_files_left_from_another_checkpoint_are_noticed(home: Path, copy: Callable[[str], Path]) -> None:
    folder = copy("z1-2-fp32")
    shutil.copy(home / "z1-3-fp32" / "three" / OPTIMIZER.format(2), folder / "three")
    with pytest.raises(CheckpointDamagedError, match=rf"{OPTIMIZER.format(2)}: it is left from another"):
        read_deepspeed(folder)
    shutil.copy(home / "z1-3-fp32" / "three" / OPTIMIZER.format(1), folder / "three" / f"bf16_{OPTIMIZER.format(1)}")
    with pytest.raises(CheckpointError, match="files of two checkpoints"):
        read_deepspeed(folder)


def test_a_rank_of_another_step_or_stage_is_noticed(home: Path, copy: Callable[[str], Path]) -> None:
    def later(content: dict[str, Any]) -> None:
        states = content["optimizer_state_dict"]["optimizer_state_dict"]["state"]
        states[0]["step"] = states[0]["step"] + 1

    folder = copy("z3-2-fp32")
    change(folder / "three" / OPTIMIZER.format(1), later)
    with pytest.raises(CheckpointDamagedError, match=rf"{OPTIMIZER.format(1)}: its optimizer is at another step"):
        read_deepspeed(folder)
    shutil.copy(home / "z2-2-fp32" / "three" / OPTIMIZER.format(1), folder / "three")
    with pytest.raises(CheckpointDamagedError, match=rf"{OPTIMIZER.format(1)}: it is not of the same checkpoint"):
        read_deepspeed(folder)


@pytest.mark.parametrize("case", ["z2-2-fp32", "z3-2-fp32"])
def test_partitions_of_another_size_are_noticed(case: str, copy: Callable[[str], Path]) -> None:
    def shorten(content: dict[str, Any]) -> None:
        inner = content["optimizer_state_dict"]
        flat = inner.get("fp32_flat_groups") or inner["single_partition_of_fp32_groups"]
        flat[0] = flat[0].detach()[:-20].clone()

    folder = copy(case)
    change(folder / "three" / OPTIMIZER.format(1), shorten)
    with pytest.raises(CheckpointDamagedError, match=r"optim_states\.pt: flat group 0 has"):
        read_deepspeed(folder)


def test_a_state_that_is_not_one_number_for_each_element_is_refused_when_it_is_asked_for(
    copy: Callable[[str], Path],
) -> None:
    def factor(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["row"] = torch.ones(5)

    folder = copy("z2-1-fp32")
    change(folder / "three" / OPTIMIZER.format(0), factor)
    parameter = read_deepspeed(folder).parameters["up.weight"]
    assert parameter.state["exp_avg"]().shape == (13, 9)
    with pytest.raises(CheckpointError, match=r"'row' of the parameter 'up\.weight'"):
        parameter.state["row"]()


def test_frozen_parameters_that_were_not_saved_are_left_out(copy: Callable[[str], Path]) -> None:
    """As with save_checkpoint(exclude_frozen_parameters=True)."""

    def leave_out(content: dict[str, Any]) -> None:
        del content["module"]["fixed.weight"]
        content["frozen_param_shapes"] = content["frozen_param_fragments"] = None

    for case, name in (("z2-1-fp32", WEIGHTS), ("z3-1-fp32", WEIGHTS_3.format(0))):
        folder = copy(case)
        change(folder / "three" / name, leave_out)
        assert "fixed.weight" not in read_deepspeed(folder).parameters


def test_a_universal_checkpoint_without_a_file_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("z3-2-fp32-universal")
    zero = folder / "three" / "zero"
    (zero / "up.weight" / "fp32.pt").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"zero/up\.weight/fp32\.pt is missing"):
        read_deepspeed(folder)
    (zero / "optimizer_state.pt").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"optimizer_state\.pt: it is not there"):
        read_deepspeed(folder)


def test_a_universal_parameter_without_gradients_has_its_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("z2-2-bf16-universal")
    shutil.rmtree(folder / "three" / "zero" / "up.weight")
    parameter = read_deepspeed(folder).parameters["up.weight"]
    assert parameter.value().dtype == torch.bfloat16
    assert not parameter.state


def test_a_universal_parameter_of_another_size_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("z2-2-bf16-universal")
    torch.save({"param": torch.zeros(3)}, folder / "three" / "zero" / "up.bias" / "exp_avg.pt")
    found = read_deepspeed(folder)
    with pytest.raises(CheckpointDamagedError, match=r"up\.bias/exp_avg\.pt"):
        found.parameters["up.bias"].state["exp_avg"]()


# --- what is not supported --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mp_rank_01_model_states.pt", "tensor- or pipeline-parallel"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor- or pipeline-parallel"),
        ("layer_00-model_states.pt", "layers of a pipeline"),
        ("layer_01-model_00-model_states.pt", "layers of a pipeline"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "mixture of experts"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "mixture of experts"),
    ],
)
def test_other_kinds_of_parallelism_are_refused(name: str, what: str, copy: Callable[[str], Path]) -> None:
    folder = copy("z1-1-fp32")
    (folder / "three" / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}.*{what}.*cannot be read"):
        read_deepspeed(folder)


@pytest.mark.parametrize(
    "facts",
    [
        {"mp_world_size": 2},
        {"checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": 1}},
        {"module": None},
        {"ds_autoep_layers": [{"num_experts": 4}]},
        {"dp_world_size": 4},
    ],
)
def test_files_that_speak_of_other_parallelism_are_refused(facts: dict[str, Any], copy: Callable[[str], Path]) -> None:
    folder = copy("z1-1-fp32")
    change(folder / "three" / WEIGHTS, lambda content: content.update(facts))
    with pytest.raises(CheckpointError, match=r"_states\.pt: .* cannot be read"):
        read_deepspeed(folder)


def test_states_on_nvme_are_refused(copy: Callable[[str], Path]) -> None:
    def swap_out(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["fp32_flat_groups"] = [torch.empty(0)] * 2

    folder = copy("z3-1-fp32")
    change(folder / "three" / OPTIMIZER.format(0), swap_out)
    with pytest.raises(CheckpointError, match="NVMe cannot be read"):
        read_deepspeed(folder)


# --- nothing but our errors -------------------------------------------------------------------------


def use(found: DeepSpeedCheckpoint) -> None:
    for parameter in found.parameters.values():
        parameter.value()
        for load in parameter.state.values():
            load()


JUNK = st.sampled_from(
    [None, True, -1, 2**80, "", "x", 0.5, (), [], {}, [None], {0: 0}, {"a": 1}, (1, 2), torch.zeros(2), torch.zeros(())]
)


def spoil(content: Any, data: st.DataObject) -> None:
    """Put something else at a random place of nested dicts and lists."""
    while True:
        places = list(content) if isinstance(content, dict) else list(range(len(content)))
        place = data.draw(st.sampled_from(places))
        inner = content[place]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            content[place] = data.draw(JUNK)
            return
        content = inner


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_file_says_is_read_or_refused_by_name(
    data: st.DataObject, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cases = ("z0-1-fp32", "z0-1-bf16", "z0-1-fused", "z1-2-bf16-acc", "z2-2-fp16", "z3-2-sub", "z2-2-bf16-universal")
    case = data.draw(st.sampled_from(cases))
    folder = tmp_path_factory.mktemp("spoilt") / case
    shutil.copytree(home / case, folder)
    paths = sorted((folder / "three").rglob("*_stat*.pt"))
    path = data.draw(st.sampled_from(paths))
    change(path, lambda content: spoil(content, data))
    error = ""
    try:
        use(read_deepspeed(folder))
    except CheckpointError as caught:
        error = str(caught)
    finally:
        shutil.rmtree(folder.parent)
    assert not error or str(folder) in error

"""A checkpoint's weights reach plain PyTorch bit for bit, and a model that they do not fit stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zerolith
from harness import run_ranks
from models import Block, make_gpt, start_engine, zero_config
from saved_runs import FP32, Truth, make_odd, same, train_and_save
from zerolith.checkpoint import export, get_fp32_state_dict, load_model
from zerolith.errors import CheckpointError, UsageError


def test_a_state_dict_fits_the_model(odd: tuple[Path, Truth]) -> None:
    folder, truth = odd
    model = make_odd(seed=7)
    assert str(model.load_state_dict(get_fp32_state_dict(folder))) == "<All keys matched successfully>"
    assert model.noted == 2
    same(
        {name: param.detach() for name, param in model.named_parameters()},
        {name: master.float() for name, master in truth.masters.items()},
    )


def test_values_reach_tensors_that_do_not_lie_row_by_row(odd: tuple[Path, Truth]) -> None:
    folder, truth = odd
    state, loaded = get_fp32_state_dict(folder), make_odd(seed=7)
    before = [tensor.data_ptr() for tensor in (*loaded.parameters(), *loaded.buffers())]
    load_model(loaded, folder)
    assert before == [tensor.data_ptr() for tensor in (*loaded.parameters(), *loaded.buffers())]
    same(
        {key: value for key, value in loaded.state_dict().items() if isinstance(value, Tensor)},
        {key: value for key, value in state.items() if isinstance(value, Tensor)},
    )
    assert loaded.noted == 2
    assert not loaded.turned.is_contiguous()
    assert not loaded.turned_buffer.is_contiguous()
    assert state["norm.running_mean"].dtype == torch.float32
    load_model(loaded.to(torch.bfloat16), folder)
    same({name: param.detach() for name, param in loaded.named_parameters()}, truth.weights)


def test_a_folder_may_be_the_job_s_or_the_checkpoint_s_own(saved: tuple[Path, Truth], tmp_path: Path) -> None:
    folder, truth = saved
    (tmp_path / "link").symlink_to(folder)
    for where, tag in [
        (folder, None),
        (folder, "global_step2"),
        (folder / "global_step2", None),
        (tmp_path / "link", None),
    ]:
        assert torch.equal(get_fp32_state_dict(where, tag)["norm.weight"], truth.masters["norm.weight"])
        assert torch.equal(get_fp32_state_dict(str(where), tag)["norm.weight"], truth.masters["norm.weight"])


@pytest.mark.parametrize(
    ("where", "tag", "words"),
    [
        ("", "global_step3", "there is no checkpoint 'global_step3' here; there is global_step2"),
        ("", "../copied/global_step2", "a tag names a folder"),
        ("", "link", "it is a symbolic link"),
        ("nowhere", None, "there is no such folder"),
        ("nowhere", "global_step2", "there is no such folder"),
        ("empty", None, "there is no checkpoint here"),
        ("broken", None, "manifest.json: it does not end with its checksum"),
        ("linked", None, "manifest.json: it cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_refused(copied: Path, where: str, tag: str | None, words: str) -> None:
    (copied / "link").symlink_to("global_step2")
    for name in ("empty", "broken", "linked"):
        (copied / name).mkdir()
    (copied / "broken" / "manifest.json").write_text("{}")
    (copied / "linked" / "manifest.json").symlink_to("../global_step2/manifest.json")
    for call in (
        lambda: get_fp32_state_dict(copied / where, tag),
        lambda: load_model(make_gpt(), copied / where, tag),
        lambda: export(copied / where, copied / "hf", tag),
    ):
        with pytest.raises(CheckpointError, match=words):
            call()
    assert not (copied / "hf").exists()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_all_that_does_not_fit_is_listed_and_nothing_changes(saved: tuple[Path, Truth]) -> None:
    model = make_gpt(layers=2)
    model.norm = nn.LayerNorm(16)
    model.more = nn.Linear(2, 2)
    model.register_buffer("mask", torch.ones(2))
    before = values(model)
    with pytest.raises(CheckpointError) as caught:
        load_model(model, saved[0])
    told = str(caught.value)
    assert "norm.weight is (32,) in the checkpoint and (16,) in the model" in told
    assert "missing in the checkpoint: mask, more.weight, more.bias" in told
    assert all(f"blocks.2.{name}" in told for name, _ in Block(32, 2).named_parameters())
    same(values(model), before)

    model.norm = nn.LayerNorm(32)
    with pytest.raises(CheckpointError, match="strict=False loads what fits"):
        load_model(model, saved[0])
    fit = load_model(model, saved[0], strict=False)
    assert sorted(fit.missing) == ["mask", "more.bias", "more.weight"]
    assert len(fit.unexpected) == len(list(Block(32, 2).parameters()))
    assert torch.equal(model.norm.weight, saved[1].masters["norm.weight"])
    assert torch.equal(model.more.weight, before["more.weight"])


def test_a_shape_is_wrong_also_where_names_may_be(saved: tuple[Path, Truth]) -> None:
    model = make_gpt(width=16)
    with pytest.raises(CheckpointError, match=r"embed.weight is \(64, 32\) in the checkpoint and \(64, 16\)"):
        load_model(model, saved[0], strict=False)


def test_names_that_are_tied_in_the_checkpoint_or_in_the_model_only(saved: tuple[Path, Truth], tmp_path: Path) -> None:
    loose = make_gpt()
    loose.head.weight = nn.Parameter(torch.zeros_like(loose.embed.weight))
    load_model(loose, saved[0])
    assert torch.equal(loose.head.weight, saved[1].masters["embed.weight"])

    folder = tmp_path / "loose"
    run_ranks(1, train_and_save, folder, 1, FP32, make_loose_gpt)
    with pytest.raises(CheckpointError, match=r"not in the model: head\.weight"):
        load_model(make_gpt(), folder)


def make_loose_gpt() -> nn.Module:
    model = make_gpt()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def test_an_engine_s_model_is_refused(saved: tuple[Path, Truth]) -> None:
    def body(stage: int) -> str:
        engine = start_engine(make_gpt(), zero_config(stage))
        with pytest.raises(UsageError) as caught:
            load_model(engine.module, saved[0])
        return str(caught.value)

    for stage in (0, 1, 3):
        assert "engine.load_checkpoint()" in run_ranks(1, body, stage)[0]
    with pytest.raises(UsageError, match=r"to_empty\(device=\.\.\.\)"):
        load_model(make_gpt().to("meta"), saved[0])


def test_what_saving_left_out_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def save_without_frozen() -> None:
        engine = start_engine(make_odd(), zero_config(2))
        engine.save_checkpoint(tmp_path / "job", exclude_frozen_parameters=True)

    run_ranks(2, save_without_frozen)
    model = make_odd(seed=3)
    before = values(model.fixed)
    assert load_model(model, tmp_path / "job") == ([], [])
    same(values(model.fixed), before)
    assert not get_fp32_state_dict(tmp_path / "job").keys() & {"fixed.weight", "fixed.bias"}
    export(tmp_path / "job", tmp_path / "hf")
    assert not load_file(tmp_path / "hf" / "model.safetensors").keys() & {"fixed.weight", "fixed.bias"}
    told = [record.getMessage() for record in caplog.records if "without frozen parameters" in record.getMessage()]
    assert [message.endswith("fixed.weight, fixed.bias") for message in told] == [True] * 3


def test_without_an_optimizer_nobody_knows_what_was_frozen(tmp_path: Path) -> None:
    def save() -> None:
        zerolith.initialize(model=make_gpt(), config={"train_batch_size": 1})[0].save_checkpoint(tmp_path)

    run_ranks(1, save)
    get_fp32_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match="does not tell which parameters were frozen"):
        get_fp32_state_dict(tmp_path, exclude_frozen_parameters=True)

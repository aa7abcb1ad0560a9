"""Updates that begin in backward as a guess, and are taken back where the step is another one: the same bits."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import zerolith
from harness import run_ranks
from models import OPTIMIZERS, PRECISIONS, assert_same, make_gpt, my_pieces, train_on, whole_masters, whole_weights
from overlapping import DATA, config_for, start
from test_ahead import (
    BF16,
    USED_IN_PARTS,
    Spoilt,
    X,
    change_the_rate,
    edit_a_weight,
    spoil,
    start_partly,
    up_to_step,
)
from unusual import CASES, config_for as unusual_config_for, inputs, train_sharded
from zerolith.errors import UsageError
from zerolith.optim import PartitionedOptimizer, before_images
from zerolith.optim.before_images import BeforeImage

ALL, SOME, NONE = 1e-3, 20.0, 1e6  # norms: so many steps are clipped
SPIKES = (2, 4)  # these, with SOME; the loss is a multiple of what it was


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many updates this rank began in backward, and how many it took back."""
    counts: Counter[str] = Counter()
    begin, restore = PartitionedOptimizer._begin_ahead, BeforeImage.restore

    def begins(optimizer: PartitionedOptimizer, *args: Any) -> None:
        counts["begun"] += 1
        begin(optimizer, *args)

    def restores(image: BeforeImage, *args: Any) -> None:
        counts["taken back"] += 1
        restore(image, *args)

    monkeypatch.setattr(PartitionedOptimizer, "_begin_ahead", begins)
    monkeypatch.setattr(BeforeImage, "restore", restores)
    return counts


def result_of(engine: Any) -> Any:
    return whole_weights(engine), whole_masters(engine), engine.get_global_grad_norm(), engine.skipped_steps


def train_spiked(engine: Any) -> tuple[list[float], list[float]]:
    """On all of DATA; returns losses of micro-batches and norms of steps."""
    losses, norms = [], []
    for number, batch in enumerate(DATA):
        for piece in my_pieces(batch, engine):
            loss = engine(piece) * (100.0 if number in SPIKES else 1.0)
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
        norms.append(engine.get_global_grad_norm())
    return losses, norms


def same_as_without(world: int, body: Any) -> list[Any]:
    """That `body` gives the same with both ways of updating; what it gives beside, with updates in backward."""
    some, others = run_ranks(world, body, "backward"), run_ranks(world, body, "none")
    assert_same([result for result, _ in some], [result for result, _ in others])
    return [beside for _, beside in some]


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [ALL, SOME, NONE])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipping_and_loss_scales_change_no_bit(
    stage: int, precision: str, clip: float, tmp_path: Path, seen: Counter[str]
) -> None:
    def body(overlap: str) -> Any:
        seen.clear()
        engine = start(overlap, tmp_path, stage=stage, gradient_clipping=clip, **PRECISIONS[precision])
        losses, norms = train_spiked(engine)
        result = losses, norms, result_of(engine), engine.get_lr()
        engine.destroy()
        return result, (seen["begun"], seen["taken back"], [norm > clip for norm in norms])

    for world in (1, 2):
        for begun, back, clipped in same_as_without(world, body):
            if (stage < 3 and precision == "fp32") or clip == ALL:
                assert begun == 0  # masters are weights, which are in sight; or every guess would be wrong
            elif precision != "fp16":
                assert clipped == [clip == SOME and number in SPIKES for number in range(len(DATA))]
                # Step 0 has none before it; with SOME, steps 1, 2 and 4 follow one that clipped nothing.
                assert begun > 0
                assert (back, begun) == ((2 * begun // 3, begun) if clip == SOME else (0, begun))
            else:
                assert begun > 0


@pytest.mark.parametrize("name", ["SGD", "Adam", "Lion", "Adagrad"])
def test_every_optimizer_of_ours(name: str, tmp_path: Path, seen: Counter[str]) -> None:
    params = {"lr": 1e-2, **({"momentum": 0.9} if name == "SGD" else {})}

    def body(overlap: str) -> Any:
        seen.clear()
        more = {"gradient_clipping": SOME, "optimizer": {"type": name, "params": params}}
        engine = start(overlap, tmp_path, **more, **BF16)
        losses = train_spiked(engine)
        return (losses, result_of(engine)), (seen["begun"], seen["taken back"])

    for begun, back in same_as_without(2, body):
        assert 0 < back < begun


def states_of(engine: Any) -> list[dict[str, Any]]:
    optimizer = engine._partitioned
    optimizer._behind.settle_all()
    return [dict(optimizer.state_of(piece.param)) for own in optimizer.gradients for piece in optimizer.pieces[own]]


def test_a_first_update_that_is_taken_back_leaves_no_state(tmp_path: Path, seen: Counter[str]) -> None:
    def body(overlap: str) -> Any:
        engine = start_partly(overlap, tmp_path, 5, gradient_clipping=NONE, **BF16)
        x = X.bfloat16()

        def step() -> None:
            engine.backward(engine(x))
            engine.step()

        step()
        without = sum(not state for state in states_of(engine))
        assert without > 0  # of the bias that was not used
        engine.module.layers[5].without_bias = False
        handle = engine.module.layers[0].register_forward_hook(lambda module, args, output: Spoilt.apply(output))
        step()
        assert engine.skipped_steps == 1
        assert sum(not state for state in states_of(engine)) == without
        handle.remove()
        for _ in range(3):
            step()
        return (result_of(engine), states_of(engine)), seen["taken back"]

    assert all(same_as_without(1, body))


@pytest.mark.parametrize("name", [name for name in CASES if "frozen" not in name])  # the optimizer is the config's
@pytest.mark.parametrize("clip", [1.0, SOME])  # that changes steps of half of them, or hardly any
def test_unusual_modules(clip: float, name: str) -> None:
    def body(overlap: str) -> Any:
        torch.manual_seed(0)
        config = unusual_config_for(3, gradient_clipping=clip)
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "overlap": overlap}
        try:
            return train_sharded(CASES[name](), None, inputs(2), config)
        except UsageError as error:
            assert overlap == "backward"
            assert name in USED_IN_PARTS
            return str(error)

    found = run_ranks(2, body, "backward")
    if isinstance(found[0], str):
        assert all("is updated already" in text for text in found), found
    else:
        assert_same(found, run_ranks(2, body, "none"))


def test_gradients_that_come_when_others_were_used(seen: Counter[str]) -> None:
    """At stage 2 nothing refuses a second part, for weights are in sight."""

    def body(overlap: str) -> Any:
        torch.manual_seed(0)
        config = unusual_config_for(2, gradient_clipping=SOME, **BF16)
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "overlap": overlap}
        model = CASES["shared, reentrant checkpoints"]().bfloat16()
        result = train_sharded(model, None, inputs(2).bfloat16(), config)
        return result, (seen["begun"], seen["taken back"])

    for begun, back in same_as_without(2, body):
        assert 0 < back <= begun


def test_four_ranks_with_weights_on_disk(tmp_path: Path, seen: Counter[str]) -> None:
    def body(overlap: str) -> Any:
        config = config_for(overlap, tmp_path, gradient_clipping=SOME, **BF16)
        config["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path / "weights")}
        config["train_micro_batch_size_per_gpu"] = 1
        engine = zerolith.initialize(model=make_gpt(), config=config)[0]
        return (train_spiked(engine), result_of(engine)), (seen["begun"], seen["taken back"])

    for begun, back in same_as_without(4, body):
        assert 0 < back < begun


# --- what is taken back ---------------------------------------------------------------------------

# (The first two steps have a learning rate of 0.)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_skips_the_step(
    stage: int, precision: str, tmp_path: Path, seen: Counter[str]
) -> None:
    def body(overlap: str) -> Any:
        seen.clear()
        engine = start(overlap, tmp_path, stage=stage, gradient_clipping=NONE, **PRECISIONS[precision])
        losses = train_on(engine, DATA[:3])
        before = whole_weights(engine), whole_masters(engine), states_of(engine)
        kept = [{name: value.clone() for name, value in state.items()} for state in before[2]]
        handle, taken_back = spoil(engine), seen["taken back"]
        train_on(engine, DATA[3:4])
        handle.remove()
        assert not engine.was_step_applied()
        assert_same((whole_weights(engine), whole_masters(engine), states_of(engine)), (*before[:2], kept))
        return (losses, train_on(engine, DATA[4:]), result_of(engine)), seen["taken back"] - taken_back

    assert all(same_as_without(2, body))


@pytest.mark.parametrize("act", [change_the_rate, edit_a_weight])
def test_what_changes_between_backward_and_step_counts(act: Any, tmp_path: Path, seen: Counter[str]) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, stage=2, gradient_clipping=NONE, **BF16)
        train_on(engine, DATA[:3])
        up_to_step(engine, DATA[3])
        act(engine)
        engine.step()
        return (train_on(engine, DATA[4:]), result_of(engine)), seen["taken back"]

    assert all(same_as_without(2, body))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_backward_that_fails_leaves_all_as_it_was(stage: int, tmp_path: Path, seen: Counter[str]) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("in the midst")

    def body(overlap: str) -> Any:
        config = {"stage": stage, "gradient_clipping": NONE, "gradient_accumulation_steps": 1, **BF16}
        engine = start(overlap, tmp_path, **config)
        train_on(engine, DATA[:3])
        handle = engine.module.blocks[0].register_full_backward_pre_hook(fail)
        loss = engine(DATA[3][:4])
        with pytest.raises(ArithmeticError):
            engine.backward(loss)
        handle.remove()
        engine.reset()
        return (whole_masters(engine), train_on(engine, DATA[3:]), result_of(engine)), seen["taken back"]

    assert all(same_as_without(2, body))


def test_the_end_of_an_engine_between_backward_and_step(tmp_path: Path) -> None:
    engine = start("backward", tmp_path, gradient_clipping=NONE, **BF16)
    model = engine.module
    train_on(engine, DATA[:3])
    before = {name: param.local.clone() for name, param in model.named_parameters()}
    up_to_step(engine, DATA[3])
    assert engine._partitioned.ahead.begun
    engine.destroy()
    assert_same({name: param.local for name, param in model.named_parameters()}, before)
    assert not [thread for thread in threading.enumerate() if "optimizer" in thread.name]


def test_a_checkpoint_over_a_step_that_has_begun(tmp_path: Path) -> None:
    def body(overlap: str) -> Any:
        engine = start(overlap, tmp_path, gradient_clipping=NONE, **BF16)
        train_on(engine, DATA[:3])
        engine.save_checkpoint(tmp_path / overlap)
        up_to_step(engine, DATA[5])
        engine.load_checkpoint(tmp_path / overlap)
        return (train_on(engine, DATA[3:]), result_of(engine)), None

    same_as_without(2, body)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [0, 60_000])
def test_what_has_no_room_waits_for_the_step(
    free: int, tmp_path: Path, seen: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before_images, "memory_of_host", lambda: (10**9, free))

    def body(overlap: str) -> Any:
        seen.clear()
        engine = start(overlap, tmp_path, gradient_clipping=SOME, **BF16)
        losses = train_spiked(engine)
        images = engine._partitioned._images
        most = images._pool._most_bytes if images is not None else 0
        assert most <= before_images.SHARE * free
        num_sections = len(engine._sharded.gradients)
        return (losses, result_of(engine)), (seen["begun"], num_sections)

    for begun, num_sections in same_as_without(2, body):
        assert (begun == 0) == (free == 0)
        assert begun < num_sections * 3  # steps in which updates begin


@pytest.mark.parametrize("clip", [ALL, NONE])
def test_the_memory_is_used_again_and_counted(clip: float, tmp_path: Path) -> None:
    engine = start("backward", tmp_path, gradient_clipping=clip, **BF16)
    train_on(engine, DATA[:3])
    pool = engine._partitioned._images._pool
    assert pool.used_bytes == 0
    num_allocated = pool.num_allocated
    train_on(engine, DATA[3:])
    assert pool.num_allocated == num_allocated
    assert engine.summary().bytes_per_rank["gradients"] > 0  # they are kept until the step
    engine.destroy()


# --- whose updates cannot be taken back ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch's optimizer", "disk", "an option of torch's"])
def test_others_are_updated_when_the_norm_is_known(
    kind: str, tmp_path: Path, seen: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Their gradients may be written to, or states are not in memory."""

    def body(overlap: str) -> Any:
        caplog.clear()
        more: dict[str, Any] = {"gradient_clipping": SOME, **BF16}
        config = config_for(overlap, tmp_path, device="nvme" if kind == "disk" else "cpu", **more)
        model = make_gpt()
        optimizer = OPTIMIZERS["SGD"](list(model.parameters())) if kind == "torch's optimizer" else None
        if optimizer is not None:
            del config["optimizer"]
        with caplog.at_level(logging.WARNING, "zerolith"):
            engine = zerolith.initialize(model=model, optimizer=optimizer, config=config)[0]
        if kind == "an option of torch's":  # which our kernels do not know
            engine.optimizer.param_groups[0]["maximize"] = True
        said = "updates do not begin in backward" in caplog.text
        assert said == (overlap == "backward" and kind != "an option of torch's" and engine.global_rank == 0)
        return (train_spiked(engine), result_of(engine)), seen["begun"]

    assert not any(same_as_without(2, body))

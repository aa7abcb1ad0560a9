"""Global batch = micro-batch * accumulation steps * ranks, from any sufficient two of them."""

import pytest
from hypothesis import given, settings, strategies as st

from zerolith.config import load_config, resolve_batch
from zerolith.errors import ConfigError

NAMES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def resolve(total, micro, steps, *, world):
    given_numbers = {name: n for name, n in zip(NAMES, (total, micro, steps), strict=True) if n is not None}
    config = resolve_batch(load_config(given_numbers), world)
    return tuple(getattr(config, name) for name in NAMES)


@pytest.mark.parametrize(
    ("given_numbers", "world", "resolved"),
    [
        ((16, 4, 2), 2, (16, 4, 2)),
        ((16, 4, None), 2, (16, 4, 2)),
        ((16, None, 2), 2, (16, 4, 2)),
        ((None, 4, 2), 2, (16, 4, 2)),
        ((16, None, None), 2, (16, 8, 1)),
        ((None, 4, None), 2, (8, 4, 1)),
        ((1, 1, 1), 1, (1, 1, 1)),
    ],
)
def test_missing_numbers_follow_from_the_rule(given_numbers, world, resolved):
    assert resolve(*given_numbers, world=world) == resolved


@pytest.mark.parametrize(
    ("given_numbers", "world", "message"),
    [
        (
            (10, 3, None),
            2,
            r"train_batch_size 10 .* 3 \* .* 2 ranks; nearest fixes: .* 6 or train_batch_size 12",
        ),
        ((8, 3, 1), 2, r"8 .* 3 \* .* 1 \* 2 ranks; .*_size 6 or train_micro_batch_size_per_gpu 4"),
        ((16, 4, 1), 2, "train_batch_size 8 or gradient_accumulation_steps 2"),
        ((1, None, None), 2, "nearest fixes: train_batch_size 2 "),
        ((9, None, 2), 2, "train_batch_size 8 or train_batch_size 12"),
        (
            (None, None, None),
            2,
            "neither train_batch_size nor train_micro_batch_size_per_gpu is set; set one",
        ),
        ((None, None, 4), 2, "neither train_batch_size nor"),
    ],
)
def test_numbers_that_do_not_multiply_out_are_refused_with_fixes(given_numbers, world, message):
    with pytest.raises(ConfigError, match=message):
        resolve(*given_numbers, world=world)


@pytest.mark.parametrize("world", [0, -1])
def test_a_world_has_at_least_one_rank(world):
    with pytest.raises(ConfigError, match="must be a positive integer"):
        resolve(4, None, None, world=world)


numbers = st.none() | st.integers(1, 100)


@settings(deadline=None)
@given(numbers, numbers, numbers, st.integers(1, 16))
def test_resolving_keeps_what_was_given_and_holds_the_rule(total, micro, steps, world):
    try:
        resolved = resolve(total, micro, steps, world=world)
    except ConfigError:
        return
    assert resolved[0] == resolved[1] * resolved[2] * world
    kept = zip((total, micro, steps), resolved, strict=True)
    assert all(number in (None, result) for number, result in kept)


def test_resolving_keeps_where_the_config_comes_from():
    raw = {"train_batch_size": 4, "log_level": "info"}
    config = resolve_batch(load_config(raw), 2)
    assert config.raw is raw
    assert [note.path for note in config.notes] == ["log_level"]

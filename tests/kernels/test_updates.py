"""Every implementation of an optimizer step equals the reference bit by bit, and torch.optim to rounding."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from harness import run_ranks
from kernels.cases import LIBRARIES, RECIPES, TARGETS, Values, all_same, any_bits, ordinary, run, same, wild
from zerolith import kernels
from zerolith.kernels import native, recipe as recipes, reference
from zerolith.kernels.arrays import CHUNK, FORMATS
from zerolith.kernels.recipe import Kind
from zerolith.optim.lion import Lion

each_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
each_target = pytest.mark.parametrize("target", TARGETS)
each_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@each_library
@each_recipe
@each_format
@each_target
def test_updates_equal_the_reference(
    library: native.Library, recipe: recipes.Recipe, dtype: torch.dtype, target: str
) -> None:
    torch.manual_seed(0)
    for make in (ordinary, wild):
        values = make(recipe.kind, 1003, dtype)
        whole = run(reference, recipe, values, target)
        assert all_same(run(library, recipe, values, target), whole)
        for start, numel in [(0, 0), (0, 1), (1, 31), (3, 32), (5, 33), (7, 100), (2, 1001)]:
            part = slice(start, start + numel)
            mine, other = (run(each, recipe, values, target, part=part) for each in (library, reference))
            assert all_same(mine, other), f"{numel} elements from {start} on"
            assert all_same([each[part] for each in mine], [each[part] for each in whole])


@each_library
@pytest.mark.parametrize("target", ["split", "torch.bfloat16"])
def test_any_length_and_offset_is_right_and_touches_nothing_else(library: native.Library, target: str) -> None:
    torch.manual_seed(1)
    values = ordinary(Kind.ADAMW, 1010, torch.bfloat16)
    whole = run(reference, RECIPES["adamw"], values, target)
    before = run(reference, RECIPES["adamw"], values, target, part=slice(0, 0))
    for numel in range(1001):
        part = slice(numel % 9, numel % 9 + numel)
        after = run(library, RECIPES["adamw"], values, target, part=part)
        for mine, new, old in zip(after, whole, before, strict=True):
            expected = old.clone()
            expected[part] = new[part]
            assert same(mine, expected), f"{numel} elements"


@each_library
@pytest.mark.parametrize("target", [str(dtype) for dtype in FORMATS])
def test_writing_past_the_caches_changes_nothing(
    library: native.Library, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "STREAM_FROM", 0)
    torch.manual_seed(2)
    values = wild(Kind.ADAMW, 1000, torch.bfloat16)
    for start in range(0, 70):
        part = slice(start, 1000 - 2 * start)
        mine, other = (run(each, RECIPES["adamw"], values, target, part=part) for each in (library, reference))
        assert all_same(mine, other)


@each_library
def test_arrays_need_no_alignment(library: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even to their elements."""
    monkeypatch.setattr(native, "STREAM_FROM", 0)
    torch.manual_seed(3)
    values = ordinary(Kind.ADAMW, 500, torch.bfloat16)
    expected = run(reference, RECIPES["adamw"], values, "torch.bfloat16")
    numels = [500 * 4, 500 * 4, 500 * 4, 500 * 2, 500 * 2]
    sources = [values.master, *values.states, values.grad, torch.zeros(500, dtype=torch.bfloat16)]
    memory = [bytearray(numel + 1) for numel in numels]
    for room, source in zip(memory, sources, strict=True):
        room[1:] = bytes(source.untyped_storage())
    views = [
        torch.frombuffer(room, dtype=source.dtype, offset=1, count=500)
        for room, source in zip(memory, sources, strict=True)
    ]
    assert views[0].data_ptr() % 2 == 1
    arrays = native.Arrays(master=views[0], states=(views[1], views[2]), grad=views[3], out=views[4])
    library.update(RECIPES["adamw"], arrays, threads=1)
    assert all_same([view.clone() for view in (views[0], views[1], views[2], views[4])], expected)


@each_library
@each_recipe
def test_the_number_of_threads_changes_nothing(library: native.Library, recipe: recipes.Recipe) -> None:
    torch.manual_seed(4)
    values = ordinary(recipe.kind, 3 * CHUNK + 7, torch.float16)
    one, two, three, many = (
        run(library, recipe, values, "torch.float16", threads=threads) for threads in (1, 2, 3, 1000)
    )
    assert all_same(one, two)
    assert all_same(one, three)
    assert all_same(one, many)
    assert all_same(one, run(reference, recipe, values, "torch.float16"))


SPECIAL = [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]
SPECIAL += [0xFFFFFFFF, 0x7F800001, 0x3F800000, 0x3F808000, 0x3F818000, 0x33800000, 0x477FF000, 0x38800000, 0x387FFFFF]
patterns = st.lists(st.sampled_from(SPECIAL) | st.integers(0, 2**32 - 1), min_size=1, max_size=6)
factors = st.floats(0, 2, width=32) | st.floats(0, 1e30) | st.sampled_from([1e-45, 1e-30, 65536.0, 1.0])
betas = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 0.9, 0.999, 1 - 2**-30])


@pytest.mark.skipif(not LIBRARIES, reason="nothing was compiled")
@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(Kind),
    bits=patterns,
    dtype=st.sampled_from(FORMATS),
    target=st.sampled_from(list(TARGETS)),
    numbers=st.tuples(factors, factors, factors, factors, factors),
    gains=st.tuples(betas, betas),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_any_values_and_numbers_give_the_same(
    kind: Kind,
    bits: list[int],
    dtype: torch.dtype,
    target: str,
    numbers: tuple[float, ...],
    gains: tuple[float, float],
    flags: tuple[bool, bool],
) -> None:
    recipe = recipes.Recipe(
        kind=kind,
        grad_factor=numbers[0],
        weight_decay=numbers[1] if kind not in (Kind.ADAMW, Kind.LION) else 0.0,
        decay=1 - numbers[2],
        first_keep=gains[0],
        first_gain=1 - gains[0],
        second_keep=gains[1],
        second_gain=1 - gains[1],
        eps=numbers[3],
        rate=numbers[4],
        is_first=flags[0],
        is_nesterov=flags[1],
    )
    pool = torch.tensor(bits).to(torch.uint32).view(torch.float32)
    tensors = [column.contiguous() for column in torch.cartesian_prod(*4 * [pool]).unbind(1)]
    values = Values(tensors[0], tensors[1 : 1 + recipes.NUM_STATES[kind]], tensors[3].to(dtype))
    expected = run(reference, recipe, values, target)
    for library in LIBRARIES.values():
        assert all_same(run(library, recipe, values, target), expected), library.instruction_set


def test_each_operation_of_the_reference_rounds_as_ieee_754_says() -> None:
    """numpy's operations do, on every length; torch's square root does not."""
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(5)
    with numpy.errstate(all="ignore"):
        for numel in (1, 5, 8, 31, 1000):
            a, b = any_bits(numel), any_bits(numel)
            x, y, factor = a.numpy(), b.numpy(), numpy.float32(0.3)
            pairs = {
                "+": (a.add(b), x + y),
                "-": (a.sub(b), x - y),
                "*": (a.mul(b), x * y),
                "/": (a.div(b), x / y),
                "* number": (a.mul(float(factor)), x * factor),
                "+ number": (a.add(float(factor)), x + factor),
                "root": (reference._root(a), numpy.sqrt(x)),
            }
            for sign, (mine, other) in pairs.items():
                assert same(mine, torch.from_numpy(other)), f"{sign} of {numel} numbers"


# --- against torch.optim ----------------------------------------------------------------------------

Step = Callable[[Tensor, dict[str, Tensor], Tensor, int], None]


def _close_case(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], states: list[str], step: Step
) -> tuple[type[torch.optim.Optimizer], dict[str, Any], list[str], Step]:
    return kind, options, states, step


ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
LION = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
CLOSE = {
    "adamw": _close_case(torch.optim.AdamW, ADAM, ["exp_avg", "exp_avg_sq"],
        lambda p, s, g, t: kernels.adamw(p, s["exp_avg"], s["exp_avg_sq"], g, step=t, **ADAM)),
    "adam": _close_case(torch.optim.Adam, ADAM, ["exp_avg", "exp_avg_sq"],
        lambda p, s, g, t: kernels.adamw(p, s["exp_avg"], s["exp_avg_sq"], g, step=t, decoupled=False, **ADAM)),
    "lion": _close_case(Lion, LION, ["exp_avg"],
        lambda p, s, g, t: kernels.lion(p, s["exp_avg"], g, **LION)),
    "adagrad": _close_case(torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01}, ["sum"],
        lambda p, s, g, t: kernels.adagrad(p, s["sum"], g, lr=0.1, lr_decay=0.1, weight_decay=0.01, step=t)),
    "sgd": _close_case(torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}, [],
        lambda p, s, g, t: kernels.sgd(p, None, g, lr=0.1, weight_decay=0.01, step=t)),
    "momentum": _close_case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}, ["momentum_buffer"],
        lambda p, s, g, t: kernels.sgd(p, s["momentum_buffer"], g, lr=0.1, momentum=0.9, dampening=0.3, step=t)),
    "nesterov": _close_case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, ["momentum_buffer"],
        lambda p, s, g, t: kernels.sgd(p, s["momentum_buffer"], g, lr=0.1, momentum=0.9, nesterov=True, step=t)),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "names", "step"), CLOSE.values(), ids=CLOSE)
def test_fifty_steps_stay_close_to_torch(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], names: list[str], step: Step
) -> None:
    """Within 50 roundings of a number of the size of the sum of all steps: 50 * 2**-24 = 3e-6, relative."""
    torch.manual_seed(6)
    param = nn.Parameter(torch.randn(1000))
    master = param.detach().clone()
    optimizer = kind([param], **options)
    states = {name: torch.zeros(1000) for name in names}
    scale = param.detach().abs()
    for number in range(1, 51):
        param.grad = torch.randn(1000)
        before = param.detach().clone()
        step(master, states, param.grad.clone(), number)
        optimizer.step()
        scale += (param.detach() - before).abs()
    assert ((master - param.detach()).abs() / scale).max() < 50 * 2**-24
    for name, state in states.items():
        torch.testing.assert_close(state, optimizer.state[param][name], rtol=3e-6, atol=3e-6)


def test_the_gradient_factor_is_applied_on_the_way() -> None:
    torch.manual_seed(7)
    masters, averages, squares = (torch.randn(2, 300), torch.randn(2, 300), torch.rand(2, 300))
    for each in (masters, averages, squares):
        each[1] = each[0]
    grad = torch.randn(300).bfloat16()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "step": 5}
    kernels.adamw(masters[0], averages[0], squares[0], grad, grad_factor=0.125 / 3, **options)
    kernels.adamw(masters[1], averages[1], squares[1], grad.float() * (0.125 / 3), **options)
    assert torch.equal(masters[0], masters[1])
    assert torch.equal(squares[0], squares[1])


def test_a_split_master_is_stepped_as_the_whole_one() -> None:
    torch.manual_seed(8)
    master, halves = torch.randn(1000), None
    states = [torch.zeros(1000) for _ in range(4)]
    halves = kernels.split(master)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    for step in range(1, 20):
        grad = torch.randn(1000).bfloat16()
        kernels.adamw(master, states[0], states[1], grad, step=step, **options)
        kernels.adamw(halves, states[2], states[3], grad, step=step, **options)
    assert torch.equal(kernels.join(halves), master)
    assert torch.equal(states[0], states[2])


def test_autograd_hears_of_the_writes() -> None:
    master, grad, out = torch.randn(10), torch.randn(10), torch.empty(10, dtype=torch.bfloat16)
    versions = [each._version for each in (master, grad, out)]
    kernels.sgd(master, None, grad, lr=0.1, step=1, out=out)
    assert [each._version for each in (master, grad, out)] == [versions[0] + 1, versions[1], versions[2] + 1]


# --- processes and threads --------------------------------------------------------------------------


def _step_many() -> Tensor:
    values = ordinary(Kind.ADAMW, 4 * CHUNK, torch.bfloat16)
    master, (first, second), grad = values
    kernels.adamw(
        master, first, second, grad, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, step=2, threads=3
    )
    return master


def test_it_works_before_and_after_a_fork() -> None:
    torch.manual_seed(9)
    expected = _step_many()

    def body() -> bool:
        torch.manual_seed(9)
        return torch.equal(_step_many(), expected)

    assert run_ranks(1, body) == [True]
    torch.manual_seed(9)
    assert torch.equal(_step_many(), expected)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_no_thread_stays_behind() -> None:
    torch.manual_seed(10)
    _step_many()
    before = len(os.listdir("/proc/self/task"))
    _step_many()
    assert len(os.listdir("/proc/self/task")) == before


def test_calls_may_come_from_several_threads() -> None:
    torch.manual_seed(11)
    values = [ordinary(Kind.SGD, 2 * CHUNK, torch.float32) for _ in range(4)]
    expected = [run(reference, RECIPES["sgd"], each, "nothing")[0] for each in values]

    def work(index: int) -> None:
        for _ in range(5):
            master = values[index].master.clone()
            kernels.sgd(master, None, values[index].grad, lr=0.1, weight_decay=0.1, step=2, grad_factor=0.37, threads=2)
            results[index] = master

    results: dict[int, Tensor] = {}
    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(same(results[index], expected[index]) for index in range(4))

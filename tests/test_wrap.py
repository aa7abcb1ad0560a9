"""Which modules become units, which parameters they hold, and how their buffers are cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import make_gpt
from zerolith import wrap
from zerolith.member import Member
from zerolith.wrap import UnitPlan, WrapPolicy, find_members, plan_units, split_members


def plans_of(model: nn.Module, **policy: object) -> dict[str, list[str]]:
    """Names of the members by name of the unit."""
    members = find_members(model, lambda name, param: Member(name=name, param=param))
    plans = plan_units(model, members, WrapPolicy(**policy))
    assert sorted(member.name for plan in plans for member in plan.members) == sorted(
        member.name for member in members
    ), "every parameter is in one unit, and in one only"
    return {plan.name: [member.name for member in plan.members] for plan in plans}


def test_blocks_that_stand_side_by_side_are_units_and_the_root_has_the_rest() -> None:
    plans = plans_of(make_gpt(), min_numel=1000)
    assert list(plans) == ["root", "blocks.0", "blocks.1", "blocks.2"]
    assert plans["root"] == ["embed.weight", "norm.weight", "norm.bias"]


def test_a_tied_weight_goes_to_the_root_and_is_listed_once() -> None:
    plans = plans_of(make_gpt(), min_numel=1)
    assert "embed" not in plans, "the embedding's weight is the head's, too"
    assert plans["root"].count("embed.weight") == 1


def test_weights_tied_within_a_unit_stay_there() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))
    layers[0][1].weight = layers[0][0].weight
    assert plans_of(layers, min_numel=1)["0"] == ["0.0.weight", "0.0.bias", "0.1.bias"]


def test_small_modules_join_the_root() -> None:
    assert list(plans_of(make_gpt(), min_numel=10**6)) == ["root"]


def test_large_modules_without_children_are_units_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Sequential(nn.Linear(20, 20), nn.Tanh()), nn.LayerNorm(10))
    assert list(plans_of(model, min_numel=100)) == ["root", "0", "1.0"]


@pytest.mark.parametrize(
    "policy",
    [
        {"unit_classes": frozenset({"LayerNorm"})},
        {"unit_classes": frozenset({"torch.nn.modules.normalization.LayerNorm"})},
        {"unit_names": frozenset({"2.0"})},
        {"unit_suffixes": (".0",)},
    ],
)
def test_classes_names_and_suffixes_make_units_of_any_size(policy: dict[str, object]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sequential(nn.LayerNorm(2)))
    assert list(plans_of(model, **policy)) == ["root", "2.0"]


def test_modules_themselves_can_be_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(plans_of(model, unit_modules=frozenset({id(model[1])}))) == ["root", "1"]


def test_containers_that_are_never_called_are_no_units() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    model.list = nn.ParameterList([torch.ones(50)])
    assert "a" not in plans_of(model, min_numel=1)


def test_a_module_with_two_paths_is_one_unit() -> None:
    shared = nn.Linear(4, 4)
    assert list(plans_of(nn.ModuleList([shared, nn.Linear(4, 4), shared]), min_numel=1)) == ["root", "0", "1"]


def members_of(*specs: tuple[int, torch.dtype, int]) -> list[Member]:
    """(elements, dtype, param group)"""
    return [
        Member(name=str(number), param=nn.Parameter(torch.zeros(numel, dtype=dtype)), group=group)
        for number, (numel, dtype, group) in enumerate(specs)
    ]


def cut(members: list[Member], bucket_numel: int = 10**9) -> list[list[str]]:
    return [[member.name for member in part] for part in split_members(members, bucket_numel=bucket_numel)]


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("specs", "bucket_numel", "expected"),
    [
        ([(5, FP32, 0), (5, BF16, 0), (5, FP32, 0)], 100, [["0", "2"], ["1"]]),  # by dtype
        ([(5, FP32, 0), (5, FP32, -1), (5, FP32, 1)], 100, [["0", "2"], ["1"]]),  # trained or frozen
        ([(5, FP32, 1), (5, FP32, 0), (5, FP32, 1)], 100, [["1", "0", "2"]]),  # groups are neighbours
        ([(5, FP32, 0), (5, FP32, 0), (5, FP32, 0)], 10, [["0", "1"], ["2"]]),  # cut at the bucket's size
        ([(50, FP32, 0), (5, FP32, 0)], 10, [["0"], ["1"]]),  # a tensor is never cut
        ([(0, FP32, 0), (10, FP32, 0), (0, FP32, 0)], 10, [["0", "1", "2"]]),
        ([], 10, []),
    ],
)
def test_sections_hold_one_kind_each_and_are_bounded(
    specs: list[tuple[int, torch.dtype, int]], bucket_numel: int, expected: list[list[str]]
) -> None:
    assert cut(members_of(*specs), bucket_numel) == expected


def test_large_tensors_have_a_section_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrap, "LARGE", 8)
    assert cut(members_of((5, FP32, 0), (8, FP32, 0), (5, FP32, 0))) == [["1"], ["0", "2"]]
    assert cut(members_of((8, FP32, 0))) == [["0"]]


def test_the_root_is_first_even_without_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plans = plan_units(
        model, find_members(model, lambda name, param: Member(name=name, param=param)), WrapPolicy(min_numel=1)
    )
    assert [plan.name for plan in plans] == ["root", "0", "1"]
    assert isinstance(plans[0], UnitPlan)
    assert plans[0].members == []

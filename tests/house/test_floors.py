"""The architecture as a test: imports go down, never round, and collectives live in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from house import floors

HOUSE = floors.read_house(floors.TOP)
EVERY_MODULE = pytest.mark.parametrize("name", HOUSE)


def test_the_house_stands() -> None:
    assert len(HOUSE) >= 10, f"only {sorted(HOUSE)} found in {floors.TOP}"
    assert "zerolith" in HOUSE


@EVERY_MODULE
def test_imports_lead_downwards(name: str) -> None:
    assert not [*floors.upward_imports(HOUSE, HOUSE[name])]


def test_imports_have_no_cycle() -> None:
    assert not [*floors.import_cycles(HOUSE)]


@EVERY_MODULE
def test_collectives_live_in_comm(name: str) -> None:
    assert not [*floors.collectives(HOUSE[name])]


# --- the checker itself, on small houses ------------------------------------------------------------


def build(tmp_path: Path, **sources: str) -> dict[str, floors.Module]:
    """A package `zerolith` of the given files; `a__b` is a/b.py, `roof` the top __init__."""
    top = tmp_path / "zerolith"
    for name, source in sources.items():
        path = top / ("__init__.py" if name == "roof" else f"{name.replace('__', '/', 1)}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return floors.read_house(top)


@pytest.mark.parametrize(
    "source",
    [
        "import zerolith.unit",
        "import zerolith.unit as u",
        "from zerolith import unit",
        "from zerolith.unit import Unit",
        "from . import unit",
        "from .unit import Unit",
        "def f():\n    from .unit import Unit",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .unit import Unit",
        "import importlib\nimportlib.import_module('zerolith.unit')",
        "import importlib\nimportlib.import_module('.unit', __package__)",
        "from .schedule import anything  # a file that is not there yet",
        "import zerolith  # the roof is above everyone",
        "from zerolith import Engine",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, source: str) -> None:
    house = build(tmp_path, roof="", layout=source, unit="class Unit: ...")
    (finding,) = floors.upward_imports(house, house["zerolith.layout"])
    assert "layout.py" in finding
    assert "(floor 0) imports zerolith" in finding


@pytest.mark.parametrize(
    "source",
    ["from ..engine import Engine", "from .. import engine", "from zerolith.engine import Engine"],
)
def test_a_package_is_on_one_floor_with_all_that_is_in_it(tmp_path: Path, source: str) -> None:
    house = build(tmp_path, roof="", engine="", optim____init__="", optim__adam=source)
    (finding,) = floors.upward_imports(house, house["zerolith.optim.adam"])
    assert "(floor 4) imports zerolith.engine" in finding


def test_on_one_floor_only_earlier_parts_may_be_imported(tmp_path: Path) -> None:
    house = build(tmp_path, layout="from .partitioning import x", partitioning="from .errors import y", errors="")
    assert [*floors.upward_imports(house, house["zerolith.layout"])]
    assert not [*floors.upward_imports(house, house["zerolith.partitioning"])]


def test_downward_and_outside_imports_are_free(tmp_path: Path) -> None:
    down = "import torch\nfrom .layout import Layout\nfrom .comm.table import row\nfrom . import errors"
    house = build(tmp_path, roof="from .unit import Unit", layout="", comm__table="", errors="", unit=down)
    assert not [finding for module in house.values() for finding in floors.upward_imports(house, module)]


def test_the_roof_shows_public_names_only(tmp_path: Path) -> None:
    house = build(tmp_path, roof="from .unit import Unit, _Phase\nfrom __future__ import annotations", unit="")
    (finding,) = floors.upward_imports(house, house["zerolith"])
    assert "zerolith.unit._Phase is private" in finding


def test_a_part_without_a_floor_is_asked_for_one(tmp_path: Path) -> None:
    house = build(tmp_path, roof="", gadget="")
    (finding,) = floors.upward_imports(house, house["zerolith.gadget"])
    assert "say on which floor 'gadget' lives" in finding


def test_a_cycle_is_found(tmp_path: Path) -> None:
    house = build(
        tmp_path,
        optim____init__="from .adam import Adam",
        optim__adam="from .lr import rate",
        optim__lr="def rate():\n    from . import Adam",
    )
    (finding,) = floors.import_cycles(house)
    assert all(name in finding for name in ("zerolith.optim <-", "zerolith.optim.adam", "zerolith.optim.lr"))


def test_siblings_in_a_package_are_no_cycle(tmp_path: Path) -> None:
    house = build(
        tmp_path,
        roof="from .optim import Adam",
        optim____init__="from .adam import Adam\nfrom . import lr",
        optim__adam="from . import lr\nfrom .lr import rate",
        optim__lr="",
    )
    assert not [*floors.import_cycles(house)]


COLLECTIVE_SOURCES = [
    "import torch.distributed",
    "import torch.distributed as dist",
    "from torch import distributed as dist",
    "from torch.distributed import all_reduce",
    "from torch.distributed.distributed_c10d import ProcessGroup",
    "import torch\ntorch.distributed.all_reduce(x)",
    "import torch as t\nt.distributed.barrier()",
    "import importlib\nimportlib.import_module('torch.distributed')",
]


@pytest.mark.parametrize("source", COLLECTIVE_SOURCES)
def test_collectives_are_found_outside_comm(tmp_path: Path, source: str) -> None:
    house = build(tmp_path, comm__primitives=source, unit=source)
    assert [*floors.collectives(house["zerolith.unit"])]
    assert not [*floors.collectives(house["zerolith.comm.primitives"])]


@pytest.mark.parametrize(
    "source",
    [
        "from torch.distributed.tensor import DTensor",
        "import torch.distributed.checkpoint as dcp",
        "import torch\ntorch.distributed.tensor.DTensor",
    ],
)
def test_types_of_torch_distributed_are_free_above_floor_0(tmp_path: Path, source: str) -> None:
    house = build(tmp_path, layout=source, parameter=source)
    assert not [*floors.collectives(house["zerolith.parameter"])]
    assert [*floors.collectives(house["zerolith.layout"])]

"""Which parameters form a unit: modules in, lists of members out. Nothing is moved here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from zerolith.member import Member

LARGE = 1 << 22  # elements: a tensor from here on fills a collective by itself, and its gradient is sent as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapPolicy:
    """What makes a module a unit.

    unit_classes: names of classes (bare, or with their module) whose instances are units, whatever their size.
    unit_names, unit_suffixes, unit_modules: paths of such modules, the paths' endings, the modules themselves.
    min_numel: smaller modules join what encloses them (DeepSpeed's stage3_param_persistence_threshold).
    bucket_numel: a unit's buffers are cut at this many elements (DeepSpeed's reduce_bucket_size).
    max_live_numel: so many elements stay whole until the step, if they rest as shards (stage3_max_live_parameters).
    """

    unit_classes: frozenset[str] = frozenset()
    unit_names: frozenset[str] = frozenset()
    unit_suffixes: tuple[str, ...] = ()
    unit_modules: frozenset[int] = frozenset()  # ids
    min_numel: int = 100_000
    bucket_numel: int = 500_000_000
    max_live_numel: float = 0


@dataclass(eq=False, kw_only=True)
class UnitPlan:
    """A module and the members that are whole while it computes. The root's plan holds all that is left."""

    name: str
    module: nn.Module
    members: list[Member] = field(default_factory=list)


def find_members(model: nn.Module, member_of: Callable[[str, nn.Parameter], Member]) -> list[Member]:
    """Every parameter once, in the model's order, made by `member_of`, with all the places that hold it."""
    members: dict[int, Member] = {}
    for path, module in model.named_modules(remove_duplicate=True):
        for attribute, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in members:
                name = f"{path}.{attribute}" if path else attribute
                members[id(param)] = member_of(name, param)
            members[id(param)].homes.append((module, attribute))
    return list(members.values())


def plan_units(model: nn.Module, members: Sequence[Member], policy: WrapPolicy) -> list[UnitPlan]:
    """Put each member into the innermost unit that contains every module that holds it.

    Units are: instances of `unit_classes`; children of one class that stand side by side in a container (a
    transformer's blocks); and large modules without children. The root comes first and takes the rest, such as
    tied weights whose users lie in different units.
    """
    root = UnitPlan(name="root", module=model)
    units = list(_units_in(model, "", policy, seen={id(model)}))
    # Reversed: a module inside several units belongs to the first of them.
    owner = {id(inner): unit for unit in reversed(units) for inner in unit.module.modules()}
    for member in members:
        owners = {owner.get(id(module), root) for module, _ in member.homes}
        plan = owners.pop() if len(owners) == 1 else root
        plan.members.append(member)
    return [root, *(unit for unit in units if unit.members)]


def living(plans: Sequence[UnitPlan], *, max_numel: float) -> list[UnitPlan]:
    """The units that stay whole until the step: the last ones, which backward needs first; the root comes last."""
    lives = []
    for plan in reversed(plans):
        numel = sum(member.param.numel() for member in plan.members)
        if numel <= max_numel:
            lives.append(plan)
            max_numel -= numel
    return lives


def split_members(members: Sequence[Member], *, bucket_numel: int) -> Iterator[list[Member]]:
    """Cut a unit's members into sections, bounded in size and ordered by param group.

    A section has one dtype and granularity and is trained or frozen. Large tensors stand alone, so that what autograd
    makes for them is a section's whole gradient.
    """
    kinds: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        kinds.setdefault((member.param.dtype, member.trained, member.granularity), []).append(member)
    for kind in kinds.values():
        bucket: list[Member] = []
        for member in sorted(kind, key=lambda each: each.group):
            if member.param.numel() >= LARGE:
                yield [member]
                continue
            if bucket and sum(each.param.numel() for each in bucket) + member.param.numel() > bucket_numel:
                yield bucket
                bucket = []
            bucket.append(member)
        if bucket:
            yield bucket


def _units_in(parent: nn.Module, path: str, policy: WrapPolicy, *, seen: set[int]) -> Iterator[UnitPlan]:
    """The units inside `parent`, without members; `seen` are the ids of modules that have been met."""
    is_container = isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    repeated = Counter(type(child) for child in parent.children()) if is_container else {}
    for name, child in parent.named_children():
        if id(child) in seen:
            continue
        seen.add(id(child))
        child_path = f"{path}.{name}" if path else name
        if _is_unit(child, child_path, repeated, policy):
            yield UnitPlan(name=child_path, module=child)
        else:
            yield from _units_in(child, child_path, policy, seen=seen)


def _is_unit(module: nn.Module, path: str, repeated: Mapping[type, int], policy: WrapPolicy) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False  # never called themselves, so hooks on them would never run
    kind = type(module)
    is_named = path in policy.unit_names or path.endswith(policy.unit_suffixes) or id(module) in policy.unit_modules
    if is_named or policy.unit_classes & {kind.__name__, f"{kind.__module__}.{kind.__qualname__}"}:
        return True
    is_block = repeated.get(kind, 0) > 1
    is_leaf = next(module.children(), None) is None
    return (is_block or is_leaf) and sum(param.numel() for param in module.parameters()) >= policy.min_numel

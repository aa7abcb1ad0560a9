"""What users say about their modules before or after `initialize`: leaf modules and external parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from zerolith.zero.owners import owner_of

# Said of a module, and forgotten with it.
_LEAVES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_EXTERNAL: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary()


def set_z3_leaf_modules(model: nn.Module, classes: Iterable[type | str]) -> list[nn.Module]:
    """Make every instance of these classes (or class names) one unit, gathered whole with all inside it.

    Call it before `initialize`. Returns the modules; raises ValueError if there are none.
    """
    wanted = list(classes)
    found = _instances(model.modules(), wanted)
    if not found:
        raise ValueError(f"no module of {type(model).__name__} is an instance of {wanted}")
    _LEAVES.update(found)
    return found


def unset_z3_leaf_modules(model: nn.Module, classes: Iterable[type | str]) -> list[nn.Module]:
    """Take `set_z3_leaf_modules` back; returns the modules."""
    found = _instances(get_z3_leaf_modules(model), list(classes))
    _LEAVES.difference_update(found)
    return found


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The leaf modules inside `model`."""
    return [module for module in model.modules() if module in _LEAVES]


def register_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Say that `module`'s forward uses `parameter` of another module, so that both are whole at that time.

    Needed only where the use cannot be seen: a sharded parameter that a forward touches is found by itself. Before
    `initialize` it is remembered.
    """
    owner = owner_of(parameter)
    if owner is None:
        _EXTERNAL.setdefault(module, []).append(parameter)
    elif owner.place.unit.is_sharded:
        owner.sharded.gatherer.add_external(module, owner.place.unit)


def unregister_external_parameter(module: nn.Module, parameter: Tensor) -> None:
    """Take `register_external_parameter` back."""
    _EXTERNAL[module] = [other for other in _EXTERNAL.get(module, ()) if other is not parameter]
    owner = owner_of(parameter)
    if owner is not None:
        owner.sharded.gatherer.remove_external(module, owner.place.unit)


def apply_remembered(model: nn.Module) -> None:
    """Register what was said of `model`'s modules before it had an engine."""
    for module in model.modules():
        for parameter in _EXTERNAL.pop(module, []):
            register_external_parameter(module, parameter)


def _instances(modules: Iterable[nn.Module], wanted: list[type | str]) -> list[nn.Module]:
    classes = tuple(kind for kind in wanted if isinstance(kind, type))
    return [module for module in modules if isinstance(module, classes) or type(module).__name__ in wanted]

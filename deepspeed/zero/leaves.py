"""Marks on modules that stage 3 must not open: their parameters are unsharded together (`set_z3_leaf_modules`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from deepspeed.zero.cut import LEAF_MARK


def set_z3_leaf_module(module: nn.Module, flag: bool = True) -> None:
    """Mark one module (or unmark it)."""
    setattr(module, LEAF_MARK, flag)


def z3_leaf_module(module: nn.Module) -> bool:
    """Whether a module is marked."""
    return bool(module.__dict__.get(LEAF_MARK, False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """All marked modules of a model."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def _mark(model: nn.Module, wanted: Sequence[type | str], flag: bool, raise_if_not_found: bool) -> list[nn.Module]:
    names = {kind for kind in wanted if isinstance(kind, str)}
    classes = tuple(kind for kind in wanted if isinstance(kind, type))
    found = []
    for module in model.modules():
        kind = type(module)
        if (classes and isinstance(module, classes)) or {
            kind.__name__,
            f"{kind.__module__}.{kind.__qualname__}",
        } & names:
            set_z3_leaf_module(module, flag)
            found.append(module)
    if not found and raise_if_not_found:
        raise ValueError(
            f"no module of {type(model).__name__} is one of {list(wanted)}.\n"
            "  Pass classes, class names or full paths of modules that the model contains."
        )
    return found


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark all modules of these classes (or class names, or full class paths); returns them. Raises ValueError if none."""
    return _mark(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Unmark all modules of these classes; returns them. Raises ValueError if there are none."""
    return _mark(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their names in the model; returns them and the names that were not found."""
    modules = dict(model.named_modules())
    names = list(module_names)
    return _by_name({name: [modules[name]] for name in names if name in modules}, names, flag, raise_if_not_found)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules whose names end so; returns them and the suffixes that matched none."""
    suffixes = list(module_name_suffixes)
    found = {s: [m for name, m in model.named_modules() if name.endswith(s)] for s in suffixes}
    return _by_name({s: modules for s, modules in found.items() if modules}, suffixes, flag, raise_if_not_found)


def _by_name(
    found: dict[str, list[nn.Module]], wanted: Sequence[str], flag: bool, raise_if_not_found: bool
) -> tuple[list[nn.Module], list[str]]:
    missing = [name for name in wanted if name not in found]
    if missing and raise_if_not_found:
        raise ValueError(f"no module is named {missing}.\n  Names are those of model.named_modules().")
    modules = [module for matches in found.values() for module in matches]
    for module in modules:
        set_z3_leaf_module(module, flag)
    return modules, missing

"""Names that are imported at first use: `__getattr__` and `__dir__` for a module (PEP 562), from a table.

Used by the package's faces (`deepspeed`, `deepspeed.zero`, `deepspeed.utils`, the legacy paths), so that
`import deepspeed` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(module_name: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`table[name]` is "package.module" (which has that name), "package.module:other", "package.module:" itself,
    or "~feature", a placeholder for what a later version has (see `porch/placeholder.py`).
    """

    def get(name: str) -> Any:
        target = table.get(name)
        if target is None:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        if target.startswith("~"):
            value = importlib.import_module("deepspeed.porch.placeholder").placeholder(module_name, name, target[1:])
            setattr(sys.modules[module_name], name, value)
            return value
        path, colon, other = target.partition(":")
        module = importlib.import_module(path)
        value = module if colon and not other else getattr(module, other or name)
        setattr(sys.modules[module_name], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module_name]), *table})

    return get, names


def invert(by_module: Mapping[str, str]) -> dict[str, str]:
    """{"package.module": "a b c"} as {"a": "package.module", ...}: how tables are written and how they are read."""
    return {name: module for module, names in by_module.items() for name in names.split()}

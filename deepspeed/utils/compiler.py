"""Leaves torch's compiler unloaded until somebody compiles.

Torch hides some of its methods from `torch.compile` by a wrapper that imports the compiler at the first call: 75 MB and more
than a second in every process that makes an optimizer (torch 2.13, CPU). Before it is loaded nothing is compiled, and there
is nothing to hide from.

Invariant: once the compiler is loaded, everything is hidden as torch has it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def is_loaded() -> bool:
    """Whether anything may have been compiled in this process: `torch.compile` loads the compiler when it is called."""
    return "torch._dynamo" in sys.modules


def hidden_if_loaded(method: Callable[P, T]) -> Callable[P, T]:
    """A function that torch hides from its compiler: as torch has it, or bare where there is no compiler."""
    return method if is_loaded() else inspect.unwrap(method)


def hidden(function: Callable[P, T]) -> Callable[P, T]:
    """A function that the compiler, which is loaded, leaves alone with everything that it calls."""
    found: Callable[P, T] = sys.modules["torch._dynamo"].disable(function)
    return found

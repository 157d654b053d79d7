"""The saved-tensor hooks that are on top, which torch tells from 2.7 on (`_top_saved_tensors_default_hooks`).

For older releases pushes and pops are noted as they happen, from the first import of this file on: torch's own contexts call them
by their names in `torch._C._autograd`. Delete `_Noted` when torch 2.6 is not supported any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Hooks = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""What packs a tensor that autograd saves, and what unpacks it."""


class _Noted(threading.local):
    """The hooks of this thread; autograd's threads begin without any, as in torch."""

    def __init__(self) -> None:
        self.stack: list[Hooks] = []

    def watch(self, autograd: Any) -> None:
        """Note from here on what is pushed and popped."""
        push, pop = autograd._push_saved_tensors_default_hooks, autograd._pop_saved_tensors_default_hooks

        def noted_push(pack: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> None:
            push(pack, unpack)
            self.stack.append((pack, unpack))

        def noted_pop() -> None:
            pop()
            if self.stack:  # what was pushed before the watch began is not here
                self.stack.pop()

        autograd._push_saved_tensors_default_hooks, autograd._pop_saved_tensors_default_hooks = noted_push, noted_pop

    def top(self) -> Hooks | None:
        """The innermost."""
        return self.stack[-1] if self.stack else None


def _teller() -> Callable[[], Hooks | None]:
    autograd: Any = torch._C._autograd
    if hasattr(autograd, "_top_saved_tensors_default_hooks"):
        return partial(autograd._top_saved_tensors_default_hooks, True)  # no frame of Python in each module's forward
    noted = _Noted()
    noted.watch(autograd)
    return noted.top


top_saved_hooks = _teller()
"""This thread's innermost (pack, unpack), also while a tracer looks; None where there are none."""

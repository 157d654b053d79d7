"""The saved-tensor hooks that are on top, which torch tells from 2.7 on (`_top_saved_tensors_default_hooks`), and their absence
while a transform runs.

For older releases pushes and pops are noted as they happen, from the first import of this file on: torch's own contexts call them
by their names in `torch._C._autograd`. Delete `_Noted` when torch 2.6 is not supported any more.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

SavedHook = Callable[[Any], Any]
SavedHooks = tuple[SavedHook, SavedHook]
"""What packs a tensor that autograd saves, and what unpacks it."""


class _Noted(threading.local):
    """The hooks of this thread; autograd's threads begin without any, as in torch."""

    def __init__(self) -> None:
        self.stack: list[SavedHooks] = []

    def watch(self, autograd: Any) -> None:
        """Note from here on what is pushed and popped."""
        push, pop = autograd._push_saved_tensors_default_hooks, autograd._pop_saved_tensors_default_hooks

        def noted_push(pack: SavedHook, unpack: SavedHook) -> None:
            push(pack, unpack)
            self.stack.append((pack, unpack))

        def noted_pop() -> None:
            pop()
            if self.stack:  # what was pushed before the watch began is not here
                self.stack.pop()

        autograd._push_saved_tensors_default_hooks, autograd._pop_saved_tensors_default_hooks = noted_push, noted_pop

    def top(self) -> SavedHooks | None:
        """The innermost."""
        return self.stack[-1] if self.stack else None


def _teller() -> Callable[[], SavedHooks | None]:
    autograd: Any = torch._C._autograd
    if hasattr(autograd, "_top_saved_tensors_default_hooks"):
        return partial(autograd._top_saved_tensors_default_hooks, True)  # no frame of Python in each module's forward
    noted = _Noted()
    noted.watch(autograd)
    return noted.top


top_saved_hooks = _teller()
"""This thread's innermost (pack, unpack), also while a tracer looks; None where there are none."""


def lower_for_transforms(is_ours: Callable[[SavedHook], bool], unseen: Callable[[], None]) -> Callable[[], None]:
    """Have the transforms of `torch.func`, which refuse to run under any such hooks, run without those whose pack `is_ours`, as
    long as there are none of others above or between them; what is returned ends that. `unseen()` tells that one began.

    The one name that transforms enter by is replaced, by itself without the hooks.
    """
    graph: Any = torch.autograd.graph
    original = graph.disable_saved_tensors_hooks

    @contextlib.contextmanager
    def disable(message: str) -> Iterator[None]:
        with _lowered(is_ours, unseen), original(message):
            yield

    def restore() -> None:
        graph.disable_saved_tensors_hooks = original

    graph.disable_saved_tensors_hooks = disable
    return restore


@contextlib.contextmanager
def _lowered(is_ours: Callable[[SavedHook], bool], unseen: Callable[[], None]) -> Iterator[None]:
    down = []
    while (hooks := top_saved_hooks()) and is_ours(hooks[0]):
        down.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    if down:
        unseen()
    try:
        yield
    finally:
        for hooks in reversed(down):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)

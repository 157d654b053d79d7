"""Whether the ranks that share layers get the same data: asked at the first forward, then no more.

A hook on the model that the engine puts there. Ranks tell each other a digest of what they were given, and all raise where
any differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

INCONSISTENT = (
    "Data inconsistency within the TP group. Please check the Dataloader implementation to ensure consistency."
)
"""The contract's words, which scripts look for."""


def check_first_forward(model: nn.Module, tell_all: Callable[[str], list[str]]) -> Any:
    """Hook `model`; `tell_all` gives every rank's digest. Returns what removes the hook. The first forward is collective."""

    def check(module: nn.Module, args: Any, kwargs: Any) -> None:
        handle.remove()
        if len(set(tell_all(digest((args, kwargs))))) > 1:
            raise AssertionError(INCONSISTENT)

    handle = model.register_forward_pre_hook(check, with_kwargs=True, prepend=True)
    return handle


def digest(value: Any) -> str:
    """Of tensors' values, and of everything else as far as it has a plain text."""
    made = hashlib.blake2b(digest_size=16)
    _add(made, value)
    return made.hexdigest()


def _add(made: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        made.update(f"{tuple(value.shape)}{value.dtype}".encode())
        if not value.is_meta and value.layout is torch.strided and not value.is_nested:
            made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            made.update(str(key).encode())
            _add(made, value[key])
    elif isinstance(value, (list, tuple)):
        made.update(str(len(value)).encode())
        for item in value:
            _add(made, item)
    elif value is None or isinstance(value, (str, bytes, int, float, bool)):
        made.update(repr(value).encode())

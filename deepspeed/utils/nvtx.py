"""`instrument_w_nvtx`: a function shown as a span in profilers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def instrument_w_nvtx(func: Callable[..., Any]) -> Callable[..., Any]:
    """Run `func` inside a profiler span of its qualified name; leaves compiled graphs unbroken."""

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        with torch.profiler.record_function(func.__qualname__):
            return func(*args, **kwargs)

    return wrapped

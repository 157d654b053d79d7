"""How long forwards take, for `InferenceEngine.model_times`: those of the engine, and those that `generate` makes of the module."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator


class ForwardTimes:
    """Milliseconds of each forward since they were last taken."""

    def __init__(self) -> None:
        self._found: list[float] = []

    def take(self) -> list[float]:
        """What was noted; forgets it."""
        found, self._found = self._found, []
        return found

    def call(self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, and note how long it took."""
        start = _now()
        outputs = module(*args, **kwargs)
        self._note(start)
        return outputs

    @contextlib.contextmanager
    def inside(self, module: Any, is_compiled: bool) -> Iterator[None]:
        """For as long, note each forward of a module by hooks, for which a compiled one leaves its graph."""
        if not isinstance(module, nn.Module):
            yield
            return
        started: list[float] = []

        def before(*_: Any) -> None:
            started.append(_now())

        def after(*_: Any) -> None:
            self._note(started.pop())

        pair = (torch.compiler.disable(before), torch.compiler.disable(after)) if is_compiled else (before, after)
        hooks = [module.register_forward_pre_hook(pair[0]), module.register_forward_hook(pair[1])]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, start: float) -> None:
        self._found.append((_now() - start) * 1e3)


def _now() -> float:
    """Seconds, once the device has done what it was given."""
    get_accelerator().synchronize()
    return time.perf_counter()

"""The hooks of ZeRO stage 3 as other libraries handle them: taken off for generation, put back after it.

TRL gathers a whole model with `GatheredParameters` and generates with it many times faster when no module stops at a
hook. It finds this object as `engine.optimizer.parameter_offload`, or as `engine.optimizer` of an engine that has no
optimizer. It also asks every module for parameters of other modules that it uses: `module.ds_external_parameters()`.

Invariant: while the hooks are off, the gatherer runs no phase, so nothing gathers or reshards but the contexts.
"""

from __future__ import annotations

import functools
from collections.abc import ItemsView
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from deepspeed.zero.hooks import ModuleHooks

EXTERNALS = "_ds_external_params"
"""Where a module keeps the parameters registered with it by `register_external_parameter`."""


class ParameterOffload:
    """Answers for the hooks of one model."""

    def __init__(self, hooks: ModuleHooks) -> None:
        self._hooks = hooks
        self.module = hooks.root
        self._times_off = 0
        self.backward_hooks: list[Any] = []
        """Backward is entered through hooks on outputs, made anew in each forward: there are none to take off."""
        for module in self.module.modules():
            externals = module.__dict__.setdefault(EXTERNALS, {})
            module.__dict__["ds_external_parameters"] = functools.partial(_items, externals)

    @property
    def forward_hooks(self) -> list[Any]:
        """Handles of the hooks before and after forward; assigning an empty list says that they were removed."""
        return self._hooks.handles

    @forward_hooks.setter
    def forward_hooks(self, handles: list[Any]) -> None:
        self._hooks.handles = list(handles)

    def take_off(self) -> None:
        """Take the hooks off the modules, until `put_back` was called as often."""
        self._times_off += 1
        for handle in self._hooks.handles:
            handle.remove()
        self._hooks.handles = []

    def put_back(self) -> None:
        """Undo one `take_off`."""
        self._times_off -= 1
        if not self._times_off:
            self._hooks.attach_to_modules()

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        """Put the hooks back on the modules."""
        self._hooks.attach_to_modules()

    def close(self) -> None:
        """Take back what this object left on the modules."""
        for module in self.module.modules():
            module.__dict__.pop("ds_external_parameters", None)


def _items(externals: dict[int, nn.Parameter]) -> ItemsView[Any, nn.Parameter]:
    return externals.items()

"""Which parameters share a bucket: cut by size where parameters are replicated, at module boundaries where sharded.

Pure over the module tree; no communication. Called by `zero.build`.

Cut by module (stage 3), for a model that is a root with a list of blocks:

    root
     |- embed            large: a unit of its own
     |- blocks           a container (ModuleList, Sequential, ModuleDict): opened; each element is a unit,
     |   |- 0  |- 1      small neighbours together, an element larger than `max_numel` is opened in turn
     |- norm             small: left to the root's own unit

A module on the way to a container is opened, so that a transformer inside a wrapper is cut at its blocks. Modules
marked as leaves (`set_z3_leaf_modules`) are never opened, nor are those that TorchScript runs: the modules inside are not
called from Python, and a scripted one takes no hooks, so that its parameters are unsharded around its caller's calls.

After FSDP's wrapping by block (arXiv:2304.11277), section 4.2; the marks are DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.zero.param import full_numel

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
"""Always opened: there is no call of theirs around which parameters could be unsharded."""
LEAF_MARK = "_z3_leaf"
TORCHSCRIPT = (torch.jit.ScriptModule, torch.jit.TopLevelTracedModule)


@dataclass
class Unit:
    """Parameters that are unsharded together, around calls of `modules`."""

    modules: list[nn.Module]
    params: list[tuple[str, nn.Parameter]] = field(default_factory=list)


def cut_by_size(numels: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive indices in chunks of at most `limit` elements (a larger one stands alone)."""
    chunks: list[list[int]] = []
    room = 0
    for i, numel in enumerate(numels):
        if not chunks or numel > room:
            chunks.append([])
            room = limit
        chunks[-1].append(i)
        room -= numel
    return chunks


class _Cutter:
    def __init__(self, root: nn.Module, wanted: dict[nn.Parameter, str], min_numel: int, max_numel: int) -> None:
        self.wanted = dict(wanted)
        self.min_numel, self.max_numel = min_numel, max_numel
        self.units: list[Unit] = []
        self._open(root)

    def _numel(self, module: nn.Module) -> int:
        return sum(full_numel(param) for param in module.parameters() if param in self.wanted)

    def _claim(self, modules: list[nn.Module], params: list[nn.Parameter]) -> None:
        claimed = [(self.wanted.pop(param), param) for param in params if param in self.wanted]
        if claimed:
            self.units.append(Unit(modules, claimed))

    def _is_opened(self, module: nn.Module, numel: int, in_container: bool) -> bool:
        if module.__dict__.get(LEAF_MARK, False) or isinstance(module, TORCHSCRIPT) or not list(module.children()):
            return False
        if isinstance(module, NEVER_CALLED) or (isinstance(module, CONTAINERS) and not in_container):
            return True
        leads_to_container = any(isinstance(inner, CONTAINERS) and any(inner.children()) for inner in module.modules())
        return numel > self.max_numel if in_container else leads_to_container

    def _open(self, module: nn.Module) -> None:
        in_container = isinstance(module, CONTAINERS)
        left: list[nn.Module] = []
        for child in module.children():
            numel = self._numel(child)
            if self._is_opened(child, numel, in_container):
                if in_container:
                    self._claim_together(left)
                    left = []
                self._open(child)
            elif numel >= self.min_numel:
                if in_container:
                    self._claim_together(left)
                    left = []
                self._claim([child], list(child.parameters()))
            else:
                left.append(child)
                if in_container and sum(self._numel(other) for other in left) >= self.min_numel:
                    self._claim_together(left)
                    left = []
        if in_container:
            self._claim_together(left)
            left = []
        own = list(module.parameters(recurse=False)) + [param for child in left for param in child.parameters()]
        self._claim([module], own)

    def _claim_together(self, modules: list[nn.Module]) -> None:
        self._claim(list(modules), [param for module in modules for param in module.parameters()])


def cut_by_module(root: nn.Module, wanted: dict[nn.Parameter, str], *, min_numel: int, max_numel: int) -> list[Unit]:
    """Units that cover the `wanted` parameters (with their names) of `root`, each exactly once, in module order."""
    cutter = _Cutter(root, wanted, min_numel, max_numel)
    assert not cutter.wanted, f"not in any module: {list(cutter.wanted.values())}"
    return cutter.units


def users_of(root: nn.Module, units: Sequence[Unit]) -> dict[nn.Module, list[int]]:
    """For each module that has to have units unsharded around its calls, their indices.

    A unit's own modules, and for a parameter registered elsewhere too (tied weights) the module that owns it there.
    """
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    callers: dict[nn.Module, nn.Module] = {}
    for module in root.modules():
        for child in module.children():
            callers.setdefault(child, module)
        for param in module.parameters(recurse=False):
            owners.setdefault(param, []).append(module)
    users: dict[nn.Module, list[int]] = {}
    for i, unit in enumerate(units):
        inside = {inner for module in unit.modules for inner in module.modules()}
        others = [owner for _, param in unit.params for owner in owners.get(param, ()) if owner not in inside]
        for user in [*unit.modules, *others]:
            module = _with_hooks(user, callers)
            indices = users.setdefault(module, [])
            if i not in indices:
                indices.append(i)
    return users


def _with_hooks(module: nn.Module, callers: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module itself, or for what TorchScript runs the nearest one around it that Python calls."""
    while isinstance(module, torch.jit.ScriptModule) or (isinstance(module, NEVER_CALLED) and module in callers):
        if module not in callers:
            raise DeepSpeedError(
                f"the model is a scripted module (torch.jit.script), {type(module).__name__}, which takes no hooks that would bring "
                "its sharded parameters together.\n  Script parts of the model, use torch.compile, or ZeRO stages 0 to 2."
            )
        module = callers[module]
    return module

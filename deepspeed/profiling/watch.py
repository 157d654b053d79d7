"""Watches the modules of a model while they run, and fills a profile.

`profiler.py` decides when. Hooks on every module keep a stack of the running ones; an `OpCounter` says what ran.

Note [Whose backward is it]
    Autograd numbers its nodes in the order in which forward makes them. Each module call is a stretch of numbers, with
    its children's stretches inside, so the node that is running in backward leads to the module that made it: whatever
    the module returns, however often it is called, and also when it was recomputed (which makes nodes anew, under the
    same hooks). Numbers are per thread; while a pass is counted, backward runs in the thread that called it.

Invariant: no hook changes what flows through it, and `detach` takes all of them away.
"""

from __future__ import annotations

import bisect
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepspeed.accelerator import get_accelerator
from deepspeed.profiling.counter import OpCounter, Phase, current_node
from deepspeed.profiling.tree import ModuleProfile

ROUTERS = ("gate", "router", "switch")
"""Words in the names of modules that send tokens to experts."""


class ModuleWatch:
    """The watch on one model. `ignored` modules, by class, and what is in them are left out of the profile."""

    def __init__(self, model: nn.Module, ignored: Sequence[type[nn.Module]] = ()) -> None:
        self.model = model
        self._ignored = tuple(ignored)
        self._profiles: dict[nn.Module, ModuleProfile] = {}
        self._is_counting = self._is_timing = False
        self._counter = OpCounter(self._count)
        self._stack: list[tuple[ModuleProfile | None, float]] = []
        self._starts: list[int] = []
        """Node numbers from which on the module at the same place in `_makers` made the nodes."""
        self._makers: list[ModuleProfile | None] = []
        self._handles: list[Any] = []
        self.update_flops = 0
        self.root = self._build()

    def _build(self) -> ModuleProfile:
        seen: set[int] = set()

        def visit(module: nn.Module, name: str, path: str, depth: int) -> ModuleProfile:
            profile = ModuleProfile(name, _kind(module), path, depth)
            self._profiles[module] = profile
            for param in module.parameters(recurse=False):
                if id(param) not in seen:
                    seen.add(id(param))
                    profile.params += _full_numel(param)
            profile.active_params = profile.params
            for child_name, child in module.named_children():
                if child not in self._profiles and not isinstance(child, self._ignored):
                    inner = f"{path}.{child_name}" if path else child_name
                    profile.children.append(visit(child, child_name, inner, depth + 1))
            return profile

        return visit(self.model, type(self.model).__name__, "", 0)

    # Hooks. --------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks in place; once is enough for any number of passes."""
        if self._handles:
            return
        for module in self.model.modules():
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def detach(self) -> None:
        """Take them away."""
        while self._handles:
            self._handles.pop().remove()
        self._stack.clear()
        self._starts.clear()
        self._makers.clear()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        profile = self._profiles.get(module)
        is_first = current_node() is None
        if profile is not None and is_first and self._is_counting:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            profile.num_calls += 1
            profile.rows += _rows(inputs[0]) if inputs else 0
        self._mark(profile)
        start_s = self._now() if self._is_timing and is_first else 0.0
        self._stack.append((profile, start_s))
        if profile is not None and self._is_timing and is_first and torch.is_grad_enabled():
            _BackwardTimer(profile, self._now).begin(module, args, kwargs)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._stack:
            return
        profile, start_s = self._stack.pop()
        if profile is not None and start_s:
            profile.forward_s += self._now() - start_s
        self._mark(self._stack[-1][0] if self._stack else None)

    def _mark(self, maker: ModuleProfile | None) -> None:
        if self._is_counting:
            self._starts.append(torch._C._autograd._get_sequence_nr())
            self._makers.append(maker)

    def _now(self) -> float:
        get_accelerator().synchronize()
        return time.perf_counter()

    # Counting and timing. ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def counting(self, is_updating: bool = False) -> Iterator[None]:
        """Count what runs inside."""
        self._is_counting = True
        self._counter.is_updating = is_updating
        try:
            with torch.autograd.set_multithreading_enabled(False), self._counter:
                yield
        finally:
            self._is_counting = False
            if not torch.is_grad_enabled():  # nothing will be differentiated
                self._starts.clear()
                self._makers.clear()

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Time modules that run inside; waits for the device around each of them."""
        self._is_timing = True
        try:
            yield
        finally:
            self._is_timing = False

    def _count(self, phase: Phase, op: str, flops: int) -> None:
        if phase is Phase.UPDATE:
            self.update_flops += flops
            return
        owner = self._owner(phase)
        if owner is not None:
            owner.own[phase] += flops

    def _owner(self, phase: Phase) -> ModuleProfile | None:
        """See Note [Whose backward is it]. What no module runs, such as a loss in the script, is the model's."""
        if phase is not Phase.BACKWARD and self._stack:
            return self._stack[-1][0]
        node = current_node()
        if node is not None:
            place = bisect.bisect_right(self._starts, node._sequence_nr()) - 1
            if place >= 0 and self._makers[place] is not None:
                return self._makers[place]
        return self.root

    def finish(self) -> ModuleProfile:
        """The profile, with what follows from all of it: active parameters, times of modules that are not called."""
        for module, profile in self._profiles.items():
            self._route(module, profile)
        for profile in reversed(list(self.root.walk())):
            profile.forward_s = profile.forward_s or sum(child.forward_s for child in profile.children)
            profile.backward_s = profile.backward_s or sum(child.backward_s for child in profile.children)
        return self.root

    def _route(self, module: nn.Module, parent: ModuleProfile) -> None:
        """Experts of `module`: a list of equal modules of which each token meets some, or stacked weights [E, ..]."""
        has_router = any(word in name for name, _ in module.named_children() for word in ROUTERS)
        for child in module.children():
            profile = self._profiles.get(child)
            if profile is None:
                continue
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and parent.rows:
                members = profile.children
                alike = {(member.kind, member.all_params) for member in members}
                rows = [member.rows for member in members]
                is_routed = len(set(rows)) > 1 or (has_router and max(rows, default=0) < parent.rows)
                if len(members) > 1 and len(alike) == 1 and is_routed and any(rows):
                    for member in members:
                        for inner in member.walk():
                            inner.active_params = inner.params * min(1.0, member.rows / parent.rows)
            elif any(param.dim() == 3 for param in child.parameters(recurse=False)) and profile.own[Phase.FORWARD]:
                rows = [count for count in (profile.rows, parent.rows) if count]
                if rows and not isinstance(child, (nn.Conv1d, nn.ConvTranspose1d)):
                    profile.active_params = min(profile.params, profile.own[Phase.FORWARD] / (2 * min(rows)))


class _BackwardTimer:
    """Times one call's backward by hooks on the tensors that go in and come out."""

    def __init__(self, profile: ModuleProfile, now: Any) -> None:
        self._profile, self._now = profile, now
        self._begun_s = self._counted_s = 0.0

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook the inputs now, and the outputs once they are there."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._ends)

        def hook_outputs(module: nn.Module, args: Any, output: Any) -> None:
            handle.remove()
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._begins)

        handle = module.register_forward_hook(hook_outputs)

    def _begins(self, gradient: Tensor) -> None:
        self._begun_s = self._begun_s or self._now()

    def _ends(self, gradient: Tensor) -> None:
        if self._begun_s:
            passed_s = self._now() - self._begun_s
            self._profile.backward_s += passed_s - self._counted_s
            self._counted_s = passed_s


def _kind(module: nn.Module) -> str:
    extra = module.extra_repr()
    return f"{type(module).__name__}({extra})" if extra and "\n" not in extra else type(module).__name__


def _full_numel(param: nn.Parameter) -> int:
    """Elements of a parameter, of the whole where ZeRO shards it (`ds_numel` is the contract's name for that)."""
    return int(getattr(param, "ds_numel", param.numel()))


def _rows(tensor: Tensor) -> int:
    """Vectors of a floating tensor, elements of one of token numbers."""
    if tensor.is_floating_point() and tensor.dim() > 0:
        return tensor.numel() // max(1, tensor.shape[-1])
    return tensor.numel()

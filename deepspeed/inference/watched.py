"""Modules whose forward is passed by, for as long as it computes what it did when they were described.

Used by `fused`, whose compiled step takes the place of whole layers: a script that gives one of their modules a hook, a forward, an
adapter, a weight or another number has to find it used. `Watched` remembers modules and is asked before each step; `own_forward` says,
before layers are described, what in them is not Hugging Face's.

Invariant: whatever is set on a module, its class, the functions that its forward names, or on all modules (global hooks) is noticed, at a few comparisons a module: its attributes are
compared as one dict, its tensors by identity and address.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from deepspeed.quant.linear import QuantizedLinear, QuantizedWeight

_OURS = (QuantizedLinear, QuantizedWeight)
_RECORDER = "transformers.utils.output_capturing"
"""Where hooks are from that Hugging Face leaves on layers once it was asked for hidden states; they do nothing but then."""


class Watched:
    """Modules inside of the layers. They are asked together, in loops of the interpreter's own: a token asks hundreds."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._kinds = [type(module) for module in self.modules]
        self._classes = list(dict.fromkeys(self._kinds))
        self._calls = list(map(_CALLS, self._classes))
        self._globals = [found for kind in self._classes for found in _functions_of(kind.forward)]
        self._attributes = [dict(module.__dict__) for module in self.modules]
        self._children = [module._modules for module in self.modules]
        self._children_were = [dict(children) for children in self._children]
        self._hooks = [hooks for module in self.modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        named = [
            (held, name, tensor)
            for module in self.modules
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]
        self._held: list[dict[str, Any]] = [held for held, _, _ in named]
        self._names = [name for _, name, _ in named]
        self._values = [tensor for _, _, tensor in named]
        self._tensors = [tensor for tensor in self._values if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    def is_as_it_was(self) -> bool:
        """Whether they still compute what they did, and nobody listens."""
        try:
            return (
                list(map(type, self.modules)) == self._kinds
                and list(map(_CALLS, self._classes)) == self._calls
                and all(held.get(name) is function for held, name, function in self._globals)
                and list(map(_ATTRIBUTES, self.modules)) == self._attributes
                and self._children == self._children_were
                and all(map(operator.is_, map(dict.get, self._held, self._names), self._values))
                and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
                and not any(map(_is_heard, filter(None, self._hooks)))
            )
        except (RuntimeError, ValueError):  # a tensor or an array in the place of another has no truth
            return False


_CALLS = operator.attrgetter("forward", "__call__", "_call_impl")
"""What a call of a module goes through, from its class or from `nn.Module`."""
_ATTRIBUTES = operator.attrgetter("__dict__")


def _functions_of(forward: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The functions beside a class that its forward calls, as its module's globals name them: rotary positions, say."""
    plain = inspect.unwrap(forward)
    held = getattr(plain, "__globals__", {})
    for name in getattr(getattr(plain, "__code__", None), "co_names", ()):
        if callable(held.get(name)):
            yield held, name, held[name]


def _is_heard(hooks: Mapping[int, Any]) -> bool:
    """Whether somebody listens; Hugging Face's recorders of hidden states do not, unless a forward is asked for them."""
    return any(getattr(hook, "__module__", None) != _RECORDER for hook in hooks.values())


def has_global_hooks() -> bool:
    """Whether somebody listens to all modules."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def own_forward(module: nn.Module) -> str | None:
    """What computes in a module's place, where that is not its class's forward, written where the class is; None where it is."""
    kind = type(module)
    if not (kind.__module__.startswith(("transformers.", "torch.nn.")) or isinstance(module, _OURS)):
        return f"a {kind.__name__} of {kind.__module__}"
    if "forward" in module.__dict__:
        return f"a {kind.__name__} whose forward was replaced"
    if kind.forward.__module__.partition(".")[0] not in ("torch", "transformers", kind.__module__.partition(".")[0]):
        return f"a {kind.__name__} whose class's forward was replaced by one of {kind.forward.__module__}"
    called = next(
        (name for name in ("__call__", "_call_impl") if not getattr(kind, name).__module__.startswith("torch.")), None
    )
    if called is not None:
        return f"a {kind.__name__} whose class's {called} was replaced by one of {getattr(kind, called).__module__}"
    return None

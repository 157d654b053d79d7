"""Modules whose forward is passed by, for as long as it computes what it did when they were described.

Used by `fused`, whose compiled step takes the place of whole layers: a script that gives one of their modules a hook, a forward, an
adapter, a weight or another number has to find it used. `Watched` remembers a module and is asked before each step; `own_forward` says,
before layers are described, what in them is not Hugging Face's.

Invariant: whatever is set on a module, its class or on all modules (global hooks) is noticed, at a few comparisons a module: its attributes are
compared as one dict, its tensors by identity and address.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

from deepspeed.quant.linear import QuantizedLinear, QuantizedWeight

_OURS = (QuantizedLinear, QuantizedWeight)
_RECORDER = "transformers.utils.output_capturing"
"""Where hooks are from that Hugging Face leaves on layers once it was asked for hidden states; they do nothing but then."""


class Watched:
    """One module inside of the layers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._class = type(module)
        self._forward = self._class.forward
        self._attributes = dict(module.__dict__)
        self._children = dict(module._modules)
        self._tensors = [
            (held, name, tensor, tensor.data_ptr())
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]

    def is_as_it_was(self) -> bool:
        """Whether it still computes what it did, and nobody listens."""
        module = self.module
        if type(module) is not self._class or self._class.forward is not self._forward:
            return False
        if module._modules != self._children:
            return False
        if (module._forward_hooks or module._forward_pre_hooks) and _has_hooks(module):
            return False
        try:
            if module.__dict__ != self._attributes:
                return False
        except (RuntimeError, ValueError):  # a tensor or an array in the place of another has no truth
            return False
        return all(held.get(name) is tensor and tensor.data_ptr() == at for held, name, tensor, at in self._tensors)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens; Hugging Face's recorders of hidden states do not, unless a forward is asked for them."""
    return any(
        getattr(hook, "__module__", None) != _RECORDER
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    )


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
    return None

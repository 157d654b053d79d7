"""A user's `injection_policy`, checked against the model: {LayerClass: "suffix", ("suffix", ...) or a class of `policies`}.

The suffixes name sub-layers whose outputs are summed over tensor-parallel ranks. Called by the engine at every tp_size, so
that a plan which matches nothing is an error where it is tried first, on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from deepspeed.utils.errors import DeepSpeedConfigError


def row_names(model: nn.Module, policy: Mapping[Any, Any]) -> list[str]:
    """Full names of the sub-layers that a policy names, in the model's order.

    Raises DeepSpeedConfigError for a key that is no class of modules, one the model has none of, and a suffix that
    matches nothing.
    """
    found: list[str] = []
    for layer_class, value in policy.items():
        if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
            raise DeepSpeedConfigError(
                f"injection_policy has the key {layer_class!r}, which is no class of modules.\n"
                "  Use the class of the model's layers, as {T5Block: ('SelfAttention.o', ...)}."
            )
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, layer_class)]
        if not layers:
            raise DeepSpeedConfigError(
                f"injection_policy names {layer_class.__name__}, of which {type(model).__name__} has none.\n"
                f"  Its layers are of the classes {', '.join(sorted(_layer_classes(model))) or '(none)'}."
            )
        for suffix in _suffixes(value):
            matches = [
                f"{prefix}.{name}".lstrip(".")
                for prefix, layer in layers
                for name, _ in layer.named_modules()
                if name == suffix or name.endswith(f".{suffix}")
            ]
            if not matches:
                inside = [name for name, inner in layers[0][1].named_modules() if name and not list(inner.children())]
                raise DeepSpeedConfigError(
                    f"injection_policy[{layer_class.__name__}] names {suffix!r}, which matches nothing in such a layer.\n"
                    f"  It has {', '.join(inside) or 'no layers inside: use the class of the layers around it'}."
                )
            found += matches
    return list(dict.fromkeys(found))


def _suffixes(value: Any) -> tuple[str, ...]:
    """The names that a value of `injection_policy` stands for. Raises DeepSpeedConfigError for what is none."""
    names = getattr(value, "row_names", value)
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise DeepSpeedConfigError(
            f"injection_policy has the value {value!r}, which names no sub-layers.\n"
            "  Use names whose outputs are summed over ranks, ('SelfAttention.o', ...), or a policy of deepspeed.module_inject."
        )
    return tuple(names)


def _layer_classes(model: nn.Module) -> Iterator[str]:
    seen = {type(item).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for item in module}
    return iter(seen)

"""Layers of a pipeline as descriptions that are built where they belong, and nowhere else.

Written by users; built by `module.PipelineModule` on the ranks whose stage has them. A description, not a module, so that
no rank holds layers of other stages even for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from deepspeed.utils.errors import DeepSpeedError, TrainingStateError
from deepspeed.utils.logging import logger


class PipelineError(TrainingStateError):
    """A call that has no meaning for a pipeline, or a failure that all ranks of one are told of."""


class LayerSpec:
    """A layer that is not built yet: `typename(*module_args, **module_kwargs)`.

    Raises RuntimeError for a `typename` that is no subclass of nn.Module.
    """

    def __init__(self, typename: type[nn.Module], *module_args: Any, **module_kwargs: Any) -> None:
        if not (isinstance(typename, type) and issubclass(typename, nn.Module)):
            raise LayerError(
                f"LayerSpec({typename!r}) only describes classes of nn.Module; give a function as it is, without LayerSpec."
            )
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def build(self, log: bool = False) -> nn.Module:
        """Make the layer, on the default device."""
        if log:
            logger.info("building %r", self)
        return self.typename(*self.module_args, **self.module_kwargs)

    def outline(self) -> nn.Module:
        """The layer without memory, to be counted; no random number is drawn."""
        state = torch.random.get_rng_state()
        try:
            with torch.device("meta"):
                return self.build()
        except (NotImplementedError, RuntimeError):  # a constructor that reads its own weights
            return self.build()
        finally:
            torch.random.set_rng_state(state)

    def __repr__(self) -> str:
        arguments = [repr(value) for value in self.module_args]
        arguments += [f"{name}={value!r}" for name, value in self.module_kwargs.items()]
        return f"{self.typename.__name__}({', '.join(arguments)})"


class TiedLayerSpec(LayerSpec):
    """A layer that shares parameters with every other of the same `key`, on whatever stage.

    forward_fn: `forward_fn(module, inputs)` in place of the module's forward, as for an output head that is the embedding
    read backwards. tied_weight_attr: the name (or names, dotted) of the shared parameters.
    """

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        self.tied_weight_attr = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)


class LayerError(DeepSpeedError, RuntimeError):
    """A description of layers that cannot be built or cut."""


def weight_at(module: nn.Module, path: str, key: str) -> nn.Parameter:
    """The parameter of a tied layer at a dotted path. Raises LayerError where there is none."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, nn.Parameter):
        raise LayerError(
            f"TiedLayerSpec({key!r}): {type(module).__name__} has no parameter {path!r} to share.\n"
            "  Name its shared parameters in tied_weight_attr."
        )
    return found

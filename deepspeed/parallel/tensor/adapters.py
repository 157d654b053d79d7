"""Adapters (PEFT) that come after layers were cut: they are made for whole layers, and refused where they are put on.

Called by `apply` once a model is cut. Adapters that are there before are cut with their layers; later ones would meet a part at the next
call, in torch's words about shapes, and be saved as parts.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from deepspeed.parallel.tensor.layers import PART
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.save_pretrained import Never

_CURE = "  Put adapters on, or load them, before the model is cut (before init_inference, initialize): they are cut with it."


def refuse_later_adapters(model: nn.Module) -> None:
    """From now on, adapters around layers of a model that is cut raise DeepSpeedError when they are put there, and further ones too
    where there are some."""
    _watch()
    for name, module in model.named_modules():
        base = module._modules.get("base_layer")
        if base is not None and PART in base.__dict__ and callable(getattr(module, "update_layer", None)):
            module.__dict__["update_layer"] = Never(
                f"another adapter for {name}, whose layer is cut over tensor-parallel ranks.\n{_CURE}"
            )


@functools.cache
def _watch() -> None:
    register_module_module_registration_hook(_refuse)


def _refuse(parent: nn.Module, name: str, module: Any) -> None:
    if name == "base_layer" and isinstance(module, nn.Module) and PART in module.__dict__:
        raise DeepSpeedError(
            f"an adapter ({type(parent).__name__}) around a layer that is cut over tensor-parallel ranks: {module}.\n{_CURE}"
        )

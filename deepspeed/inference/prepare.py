"""A module made ready to run: cast, then placed on its device.

Called by the engine for each module that it is given. Parameters are cast as `from_pretrained(dtype=...)` would have loaded
them: what a Hugging Face model keeps in fp32 stays so, and buffers that are no part of its weights (rotary frequencies) are
left in the precision they were computed in, because the same words come only from the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.quant.linear import QuantizedWeight
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once


def own_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of most of a module's floating-point parameters; fp32 for one without."""
    numbers: dict[torch.dtype, int] = {}
    for param in module.parameters():
        if param.is_floating_point():
            numbers[param.dtype] = numbers.get(param.dtype, 0) + param.numel()
    return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)


def run_dtype(module: nn.Module, config: DeepSpeedInferenceConfig) -> torch.dtype:
    """What a module is cast to. Raises DeepSpeedConfigError, a ValueError, for what the device cannot compute in."""
    if config.dtype is torch.int8:
        return own_dtype(module)
    supported = get_accelerator().supported_dtypes()
    if config.dtype in supported:
        return config.dtype
    if "dtype" not in config.model_fields_set:
        dtype = own_dtype(module)
        warn_once(
            f"This device does not compute in fp16, the default of init_inference: running in {dtype_name(dtype)}."
        )
        return dtype
    raise DeepSpeedConfigError(
        f"dtype = {dtype_name(config.dtype)} is not supported by this device.\n"
        f"  Use one of {', '.join(map(dtype_name, supported))}."
    )


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast in place: floating-point parameters, and buffers that are saved with them."""
    is_kept = _kept_in_fp32(module, dtype)
    has_own_rules = hasattr(module, "_keep_in_fp32_modules")
    for prefix, inner in module.named_modules():
        if isinstance(inner, QuantizedWeight):
            inner.to(dtype)  # what it becomes; its scales stay
            continue
        for name, param in inner.named_parameters(recurse=False):
            if param.is_floating_point():
                target = torch.float32 if is_kept(f"{prefix}.{name}") else dtype
                if param.dtype != target:
                    param.data = param.data.to(target)
        for name, buffer in inner.named_buffers(recurse=False):
            is_computed = has_own_rules and name in inner._non_persistent_buffers_set
            if buffer.is_floating_point() and not is_computed and not is_kept(f"{prefix}.{name}"):
                inner._buffers[name] = buffer.to(dtype)


def _kept_in_fp32(module: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which names a Hugging Face model says to keep in fp32."""
    pieces: list[str] = []
    if dtype is torch.float16:
        pieces += _names(module, "_keep_in_fp32_modules")
    if dtype is not torch.float32:
        pieces += _names(module, "_keep_in_fp32_modules_strict")
    if not pieces:
        return lambda name: False
    pattern = re.compile("|".join(rf"(^|\.){re.escape(piece)}($|\.)" for piece in pieces))
    return lambda name: pattern.search(name) is not None


def _names(module: nn.Module, attribute: str) -> Iterable[str]:
    return getattr(module, attribute, None) or ()


def place(module: nn.Module, config: DeepSpeedInferenceConfig) -> None:
    """Move to this rank's device, unless it is to stay on the host. What is still on "meta" gets memory without values."""
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        warn_once(f"{type(module).__name__} is on the meta device and no checkpoint was given: it has no values.")
        module.to_empty(device=torch.device(get_accelerator().current_device_name()))
    if not config.keep_module_on_host:
        module.to(torch.device(get_accelerator().current_device_name()))


def is_on_host(module: nn.Module) -> bool:
    """Whether all parameters are in main memory."""
    return all(param.device.type == "cpu" for param in module.parameters())

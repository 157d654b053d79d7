"""What the configured precision puts around the model's forward: casts of its inputs, autocast, wider products on CPUs."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.config import Config
from deepspeed.precision import Widening, needs_wide_matmul
from deepspeed.zero.policy import ZeroPolicy


class ForwardCasts:
    """Made once per engine; `widening` is on the model's modules until it is detached."""

    def __init__(self, model: nn.Module, config: Config, policy: ZeroPolicy, device: torch.device) -> None:
        dtype = policy.parameters.dtype
        widens = device.type == "cpu" and needs_wide_matmul(dtype)
        self.widening = Widening(model.modules() if widens else ())
        self._device_type = device.type
        self._autocast_dtype = (
            (config.torch_autocast.dtype or torch.bfloat16) if config.torch_autocast.enabled else None
        )
        self._input_dtype = dtype if config.fp16.enabled and config.fp16.auto_cast else None
        self.is_autocast = self._autocast_dtype is not None
        """Whether `context` does anything."""
        self.casts_inputs = self._input_dtype is not None
        """Whether `inputs` does."""

    def inputs(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments, floating tensors in the model's dtype where `fp16.auto_cast` asks for it."""
        dtype = self._input_dtype
        return inputs if dtype is None else tuple(_cast_floating(value, dtype) for value in inputs)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast where it is configured."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device_type, dtype=self._autocast_dtype)


def _cast_floating(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

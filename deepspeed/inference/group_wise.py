"""`Quantizer` and `DeQuantizer`, the original's group-wise classes for scripts that quantize tensors themselves.

Their format is its own, beside those of `kernels`: scale = (2^bits - 1) / (max - min), q = round((x - min) * scale) as uint8, for 4 bits
two along the last dim in a byte, the first in the high bits; an element is q / scale + min. A group of equal elements has scale 1
(the original divides by 0 there). Layers are quantized by `quant`, not by these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepspeed.config.execution import QuantizationSpecConfig
from deepspeed.config.explain import read_section
from deepspeed.utils.errors import DeepSpeedConfigError


class _GroupWise:
    """What both are told."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._spec = read_section(QuantizationSpecConfig, dict(config))
        if self._spec.symmetric:
            raise DeepSpeedConfigError(
                "symmetric = true: groups of these classes have a minimum.\n  Set symmetric to false."
            )

    def _grouped(self, shape: torch.Size) -> list[int]:
        """A shape with its `group_dim` as groups and elements of a group."""
        dim, size = self._spec.group_dim, self._spec.group_size
        if not -len(shape) <= dim < len(shape) or shape[dim] % size:
            raise DeepSpeedConfigError(
                f"group_size = {size} does not divide dim {dim} of {list(shape)}.\n  Choose a divisor, or another group_dim."
            )
        dim %= len(shape)
        return [*shape[:dim], shape[dim] // size, size, *shape[dim + 1 :]]

    def _along(self, shape: torch.Size) -> int:
        return self._spec.group_dim % len(shape) + 1


class Quantizer(_GroupWise):
    """`Quantizer({"num_bits": 8, "group_size": 64, "group_dim": 1, "symmetric": False})`."""

    def quantize(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A floating-point tensor as uint8 of its shape (4 bits: half the last dim), with the scale and minimum of each group, fp32
        [..., groups, 1, ...]. Raises DeepSpeedConfigError for sizes that do not go, and values that are not finite."""
        groups = tensor.detach().float().reshape(self._grouped(tensor.shape))
        along = self._along(tensor.shape)
        low, high = groups.amin(along, keepdim=True), groups.amax(along, keepdim=True)
        if not bool(torch.isfinite(high - low).all()):
            raise DeepSpeedConfigError(
                f"a tensor {list(tensor.shape)} holds NaN or infinity and cannot be quantized.\n  Check where it is from."
            )
        top = 2**self._spec.num_bits - 1
        scale = torch.where(high > low, top / (high - low), 1.0)
        q = ((groups - low) * scale).round().clamp(0, top).to(torch.uint8).reshape(tensor.shape)
        if self._spec.num_bits == 4:
            if q.shape[-1] % 2:
                raise DeepSpeedConfigError(
                    f"the last dim of {list(q.shape)} is odd: two elements of 4 bits share a byte.\n  Use 8 bits."
                )
            q = q[..., 0::2] << 4 | q[..., 1::2]
        return q, scale, low


class DeQuantizer(_GroupWise):
    """`DeQuantizer(config, torch.float16)`, with the configuration that the `Quantizer` had."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config)
        self._dtype = dtype

    def dequantize(self, tensor: Tensor, quant_scale: Tensor, quant_min: Tensor) -> Tensor:
        """What `quantize` returned, as floats of the first shape, computed in fp32 and rounded once to the dtype."""
        if self._spec.num_bits == 4:
            tensor = torch.stack([tensor >> 4, tensor & 15], -1).flatten(-2)
        groups = tensor.reshape(self._grouped(tensor.shape))
        return (groups.float() / quant_scale.float() + quant_min.float()).to(self._dtype).reshape(tensor.shape)

"""`Quantizer`, `DeQuantizer` and `GroupQuantizer`, the original's group-wise classes for scripts that quantize tensors themselves.

Their format is its own, beside those of `kernels`: scale = (2^bits - 1) / (max - min), q = round((x - min) * scale) as uint8, for 4 bits
two along the last dim in a byte, the first in the high bits; an element is q / scale + min. A group of equal elements has scale 1
(the original divides by 0 there). Layers are quantized by `quant`, not by these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


class GroupQuantizer:
    """The older kind: symmetric groups of whole rows, scale = 2 max|x| / 2^bits, q = round(x / scale) from -2^(bits - 1)."""

    def __init__(self, q_int8: bool = True, group_size: int = 1, num_bits: int = 8, num_groups: int = 0) -> None:
        if not 2 <= num_bits <= 8:
            raise DeepSpeedConfigError(f"num_bits = {num_bits}: integers of int8 have 2 to 8 bits.")
        self.group_size, self.num_bits, self.q_int8, self.num_groups = group_size, num_bits, q_int8, num_groups

    def quantize(self, inputs: Tensor, qkv: bool = True, count: int = 1, parallel_dim: int = 0) -> nn.Parameter:
        """A frozen int8 parameter of the same shape, whose attribute `scale` is fp32 [groups, 1]: x is about q times it. `num_groups`
        groups, or one for each `group_size` rows. As it is, with an empty scale, without `q_int8` or `qkv`.

        `count` and `parallel_dim` change nothing: ranks quantize their own parts. Raises DeepSpeedConfigError for groups that do not
        divide, and values that are not finite.
        """
        if not self.q_int8 or not qkv:
            kept = nn.Parameter(inputs.detach(), requires_grad=False)
            kept.scale = torch.empty(1)  # type: ignore[attr-defined]
            return kept
        num_groups = self.num_groups or len(inputs) // max(self.group_size, 1)
        if num_groups < 1 or inputs.numel() % num_groups or (not self.num_groups and len(inputs) % self.group_size):
            raise DeepSpeedConfigError(
                f"{list(inputs.shape)} does not divide into groups of {self.group_size} rows, or {self.num_groups} groups.\n"
                "  Choose a divisor."
            )
        groups = inputs.detach().float().reshape(num_groups, -1)
        largest = groups.abs().amax(1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            raise DeepSpeedConfigError(
                f"a tensor {list(inputs.shape)} holds NaN or infinity and cannot be quantized.\n  Check where it is from."
            )
        half = 2 ** (self.num_bits - 1)
        scale = torch.where(largest > 0, largest / half, 1.0)
        q = (groups / scale).round().clamp(-half, half - 1).to(torch.int8).reshape(inputs.shape)
        made = nn.Parameter(q, requires_grad=False)
        made.scale = scale  # type: ignore[attr-defined]
        return made

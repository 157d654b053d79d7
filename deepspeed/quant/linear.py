"""A weight of 8 or 4 bits, and the layers that use one: what `nn.Linear` and `nn.Embedding` are, in less memory.

Made by `replace`. Few rows (one token after the other) are multiplied by compiled loops that read the weight as it rests
(`kernels.native_products`); for many, and wherever the loops do not reach, the weight is made whole for the product and given back.

Invariant: a layer's answer is that of the dequantized weight, within the rounding of its inputs to 15 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.kernels import native_products
from deepspeed.kernels.reference import quantize as formats
from deepspeed.kernels.reference.quantize import Quantized
from deepspeed.kernels.table import pick
from deepspeed.quant.spec import Spec
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedError


class QuantizedWeight(nn.Module):
    """[rows, width] as integers with a scale (and a minimum) per group; layers that are tied share one.

    Buffers: `values` [groups, bytes], `scales` and `minima` [groups] fp32, `minima` None where groups are symmetric.
    """

    values: Tensor
    scales: Tensor
    minima: Tensor | None

    def __init__(self, weight: Tensor, spec: Spec) -> None:
        super().__init__()
        self.rows, self.width = weight.shape
        self.spec = spec
        self.dtype = weight.dtype
        quantized: Quantized = pick("quantize", weight.device.type)(
            weight.detach(), spec.group_size, spec.num_bits, symmetric=spec.symmetric
        )
        if formats.has_bad_groups(quantized):
            raise DeepSpeedError(
                f"a weight {list(weight.shape)} holds NaN or infinity and cannot be quantized.\n  Check what was loaded."
            )
        for name, value in zip(("values", "scales", "minima"), quantized, strict=True):
            self.register_buffer(name, value)

    @property
    def parts(self) -> Quantized:
        """Values, scales and minima."""
        return Quantized(self.values, self.scales, self.minima)

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, width], dequantized."""
        found: Tensor = pick("dequantize", self.values.device.type)(self.parts, self.spec.num_bits, dtype or self.dtype)
        return found.view(self.rows, self.width)

    def rows_at(self, indices: Tensor) -> Tensor:
        """[..., width], the rows of some indices."""
        per_row = self.width // self.spec.group_size
        at = (indices.reshape(-1, 1) * per_row + torch.arange(per_row, device=indices.device)).reshape(-1)
        minima = None if self.minima is None else self.minima[at]
        found = formats.dequantize(Quantized(self.values[at], self.scales[at], minima), self.spec.num_bits, self.dtype)
        return found.view(*indices.shape, self.width)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves; a cast changes what the weight becomes and leaves its scales as they are."""
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        kept = {name: value.dtype for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            value = self._buffers[name]
            if value is not None and value.dtype != before:
                raise DeepSpeedError(
                    f"a quantized weight cannot be cast to {dtype_name(dtype)} as it is.\n"
                    "  Give init_inference a model in that dtype, with dtype=torch.int8."
                )
        self.dtype = dtype
        return self


class QuantizedLinear(nn.Module):
    """y = x W^T + b. `weight` is the dequantized one, made anew each time it is read."""

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.in_features, self.out_features = weight.width, weight.rows
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._is_compiled = weight.spec.symmetric and native_products.takes(weight.spec.group_size)

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]."""
        return self.quantized.whole()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        num_rows = x.numel() // self.in_features
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        is_few = 0 < num_rows <= native_products.MAX_ROWS and x.device.type == "cpu"
        if self._is_compiled and is_few and not needs_gradient:
            weight = self.quantized
            y = native_products.quantized_product(x, weight.parts, weight.spec.num_bits, weight.rows, self.bias)
            return y.to(x.dtype)
        return F.linear(x, self.quantized.whole(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """As `nn.Linear`, and how it is quantized."""
        spec = self.quantized.spec
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={spec.num_bits}, group={spec.group_size}"


class QuantizedEmbedding(nn.Module):
    """Rows of a quantized weight, which a tied head may share."""

    def __init__(self, weight: QuantizedWeight, padding_idx: int | None) -> None:
        super().__init__()
        self.quantized = weight
        self.num_embeddings, self.embedding_dim, self.padding_idx = weight.rows, weight.width, padding_idx

    @property
    def weight(self) -> Tensor:
        """[num_embeddings, embedding_dim]."""
        return self.quantized.whole()

    def forward(self, indices: Tensor) -> Tensor:
        """[..., embedding_dim]."""
        return self.quantized.rows_at(indices)

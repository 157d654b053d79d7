"""A weight of 8 or 4 bits, and the layers that use one: what `nn.Linear` and `nn.Embedding` are, in less memory.

Made by `replace`. Few rows (one token after the other) are multiplied by what reads the weight as it rests: compiled loops
(`kernels.native_products`), on GPUs a Triton kernel. For many, and wherever these do not reach, the weight is made whole for the
product and given back.

Invariant: a layer's answer is that of the dequantized weight, on CPUs within the rounding of its inputs to 15 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from deepspeed.kernels import native_products, native_quantize
from deepspeed.kernels.reference import quantize as formats
from deepspeed.kernels.reference.quantize import Quantized
from deepspeed.kernels.table import pick
from deepspeed.mesh import marks
from deepspeed.quant.dequantized import Dequantized, refuse_writing
from deepspeed.quant.spec import Spec
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.values import has_values

_PIECE_NUMEL = 1 << 18


class NotFiniteError(DeepSpeedError):
    """A weight to be quantized holds NaN or infinity."""


class QuantizedWeight(nn.Module):
    """[rows, width] as integers with a scale (and a minimum) per group; layers that are tied share one.

    Buffers: `values` [groups, bytes], `scales` and `minima` [groups] fp32, `minima` None where groups are symmetric. After `pack`
    they are one parameter instead, `packed`: the same bytes end to end, in a dtype that ZeRO shards and offloads.
    """

    values: Tensor
    scales: Tensor
    minima: Tensor | None
    packed: nn.Parameter | None
    is_transposed: bool
    """Whether the layer that it was made of has [width, rows]."""

    def __init__(self, weight: Tensor, spec: Spec) -> None:
        super().__init__()
        flat = weight.detach().reshape(-1)
        if flat.is_cpu:
            quantized = _quantized(flat.split(piece_numel(spec)), flat.numel(), spec)
        else:
            quantized = pick("quantize", flat.device.type)(
                flat, spec.group_size, spec.num_bits, symmetric=spec.symmetric
            )
        self._hold(weight.shape, weight.dtype, quantized, spec)

    @classmethod
    def of_pieces(cls, shape: Sequence[int], dtype: torch.dtype, pieces: Iterable[Tensor], spec: Spec) -> Self:
        """A weight that becomes one of `dtype`, from its elements in order, in flat tensors of `piece_numel` each (the last: the rest)."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._hold(shape, dtype, _quantized(pieces, math.prod(shape), spec), spec)
        return made

    def _hold(self, shape: Sequence[int], dtype: torch.dtype, quantized: Quantized, spec: Spec) -> None:
        self.rows, self.width = shape
        self.spec = spec
        self.dtype = dtype
        if not quantized.values.is_meta and formats.has_bad_groups(quantized):
            raise NotFiniteError(
                f"a weight {list(shape)} holds NaN or infinity and cannot be quantized.\n  Check what was loaded."
            )
        for name, value in zip(("values", "scales", "minima"), quantized, strict=True):
            self.register_buffer(name, value)
        self.register_parameter("packed", None)
        self.is_transposed = False
        self._values_like = torch.empty_like(quantized.values, device="meta")

    @property
    def parts(self) -> Quantized:
        """Values, scales and minima."""
        return Quantized(self.values, self.scales, self.minima) if self.packed is None else self._unpacked(self.packed)

    def pack(self, dtype: torch.dtype) -> None:
        """Make the buffers one frozen parameter of `dtype`, bit for bit; again is nothing. Raises DeepSpeedError where it is one of
        another dtype: a cast would change the bits."""
        if self.packed is not None:
            if self.packed.dtype is not dtype:
                raise DeepSpeedError(
                    f"a quantized weight was packed for a model in {dtype_name(self.packed.dtype)}, and now runs in "
                    f"{dtype_name(dtype)}.\n  Give both configurations one precision (fp16, bf16)."
                )
            return
        scales = [part for part in (self.scales, self.minima) if part is not None]
        pieces = [part.reshape(-1).view(torch.uint8) for part in (*scales, self.values)]
        whole = torch.zeros(-(-sum(map(len, pieces)) // 16) * 16, dtype=torch.uint8, device=self.values.device)
        torch.cat(pieces, out=whole[: sum(map(len, pieces))])
        self.packed = nn.Parameter(whole.view(dtype), requires_grad=False)
        self._buffers.update(dict.fromkeys(("values", "scales", "minima")))

    def _unpacked(self, packed: Tensor) -> Quantized:
        raw = packed.view(torch.uint8)
        like, nbytes = self._values_like, 4 * self._values_like.shape[0]
        starts = (0,) if self.spec.symmetric else (0, nbytes)
        scales = [_floats(raw[start : start + nbytes]) for start in starts]
        at = starts[-1] + nbytes
        values = raw[at : at + like.nbytes].view(like.dtype).view(like.shape)
        return Quantized(values, scales[0], scales[1] if len(scales) == 2 else None)

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """[rows, width], dequantized."""
        parts = self.parts
        found: Tensor = pick("dequantize", parts.values.device.type)(parts, self.spec.num_bits, dtype or self.dtype)
        return found.view(self.rows, self.width)

    def rows_at(self, indices: Tensor) -> Tensor:
        """[..., width], the rows of some indices."""

        def at(part: Tensor) -> Tensor:  # refuses other dtypes and indices outside as a plain embedding does
            return F.embedding(indices.reshape(-1), part.view(self.rows, -1)).view(-1, *part.shape[1:])

        values, scales, minima = self.parts
        taken = Quantized(at(values), at(scales), None if minima is None else at(minima))
        found = formats.dequantize(taken, self.spec.num_bits, self.dtype)
        return found.view(*indices.shape, self.width)

    def take(self, state: dict[str, Any], key: str, errors: list[str]) -> None:
        """In a state dict that is being loaded, put integers in the place of this layer's whole weight, where it is one; a weight of
        which ranks have parts gives this rank's. What does not go is added to `errors`, and nothing changes."""
        if not isinstance(given := state.get(key), Tensor):
            return
        del state[key]
        given = marks.own_part(given, marks.of(self).cuts)
        shape = [self.width, self.rows] if self.is_transposed else [self.rows, self.width]
        made = self
        if list(given.shape) != shape:
            errors.append(f"{key} is {list(given.shape)} in what is loaded, and {shape} here, quantized.")
        else:
            given = given.t() if self.is_transposed else given
            device = (self.values if self.packed is None else self.packed).device
            try:
                made = QuantizedWeight(given.to(device, self.dtype).contiguous(), self.spec)
            except NotFiniteError as error:
                errors.append(f"{key}: {error}")
            if self.packed is not None and made is not self:
                made.pack(self.packed.dtype)
        held = {**made._buffers, **made._parameters}
        prefix = key.removesuffix("weight") + "quantized."
        state.update({prefix + name: part.detach() for name, part in held.items() if part is not None})

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves; a cast changes what the weight becomes and leaves its integers and scales as they are."""
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.packed is not None and fn(torch.empty(0, dtype=self.packed.dtype)).dtype is not self.packed.dtype:
            self.dtype = dtype  # bytes in a parameter of an engine, which has its place
            return self
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != before.dtype:
                self._buffers[name] = before.to(now.device)
        self.dtype = dtype
        return self


def piece_numel(spec: Spec) -> int:
    """Elements that are quantized at a time, whole groups: few enough to stay in a processor's cache from reading to writing."""
    return max(_PIECE_NUMEL // spec.group_size, 1) * spec.group_size


def _quantized(pieces: Iterable[Tensor], numel: int, spec: Spec) -> Quantized:
    """All groups of `numel` elements in main memory, beside which it holds what one piece needs."""
    made = native_quantize.empty_groups(numel // spec.group_size, spec.group_size, spec.num_bits, spec.symmetric)
    at = 0
    for piece in pieces:
        stop = at + piece.numel() // spec.group_size
        out = Quantized(*(None if part is None else part[at:stop] for part in made))  # type: ignore[arg-type]
        native_quantize.quantize(piece, spec.group_size, spec.num_bits, symmetric=spec.symmetric, out=out)
        at = stop
    assert at == len(made.scales), "pieces cover the weight"
    return made


def _floats(raw: Tensor) -> Tensor:
    """Bytes as fp32; copied where a neighbour in the bucket leaves them at an odd place."""
    return (raw if raw.storage_offset() % 4 == 0 and raw.data_ptr() % 4 == 0 else raw.clone()).view(torch.float32)


def _refuse_weight(name: str) -> None:
    if name == "weight":
        refuse_writing("assignment")


class QuantizedLinear(nn.Module):
    """y = x W^T + b. `weight` is the dequantized one, made anew each time it is read, and cannot be written."""

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.in_features, self.out_features = weight.width, weight.rows
        held = (
            None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        )  # the layer's may be shared memory
        marks.carry_over(bias, held)
        self.register_parameter("bias", held)
        self.is_compiled = weight.spec.symmetric and native_products.takes(weight.spec.group_size)
        """Whether few rows are multiplied with the weight as it rests."""

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features]."""
        return self.quantized.whole().as_subclass(Dequantized)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As a module's; a weight is refused."""
        _refuse_weight(name)
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        """As a module's; whole weights are quantized."""
        marks.take_own_parts(self, state_dict, prefix)
        self.quantized.take(state_dict, f"{prefix}weight", errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        y = None if torch.is_grad_enabled() and x.requires_grad else self._of_few_rows(x)
        return F.linear(x, self.quantized.whole(x.dtype), self.bias) if y is None else y

    def _of_few_rows(self, x: Tensor) -> Tensor | None:
        """The answer from the weight as it rests; None where it has to be made whole."""
        weight, kind = self.quantized, x.device.type
        if kind != "cpu":
            product = pick("quantized_product", kind)
            if product is None or not has_values(x) or torch.is_autocast_enabled(kind):
                return None
            found: Tensor | None = product(x, weight.parts, weight.spec.num_bits, weight.rows, self.bias)
            return found
        if self.is_compiled and 0 < x.numel() // self.in_features <= native_products.MAX_ROWS:
            y = native_products.quantized_product(x, weight.parts, weight.spec.num_bits, weight.rows, self.bias)
            return y.to(x.dtype)
        return None

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
        return self.quantized.whole().as_subclass(Dequantized)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As a module's; a weight is refused."""
        _refuse_weight(name)
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        """As a module's; whole weights are quantized."""
        marks.take_own_parts(self, state_dict, prefix)
        self.quantized.take(state_dict, f"{prefix}weight", errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def forward(self, indices: Tensor) -> Tensor:
        """[..., embedding_dim]."""
        return self.quantized.rows_at(indices)


class QuantizedScaledEmbedding(QuantizedEmbedding):
    """Hugging Face's word embedding that is multiplied with `embed_scale`, which a script may still set."""

    embed_scale: Tensor | float

    def __init__(self, weight: QuantizedWeight, padding_idx: int | None, embed_scale: Tensor | float) -> None:
        super().__init__(weight, padding_idx)
        if isinstance(embed_scale, Tensor):
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        else:
            self.embed_scale = embed_scale

    def forward(self, indices: Tensor) -> Tensor:
        """[..., embedding_dim]."""
        rows, scale = super().forward(indices), self.embed_scale
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)

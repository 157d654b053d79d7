"""One new token of each sequence through all layers of a decoder, compiled: one call for a token, whatever the number of layers.

Used by `inference.fused`, which describes a model's layers once (`Layers`), puts them over each cache and calls `step` for each token. Products read weights as they
rest, in fp32, bf16, int8 or int4 (`native_products`), attention reads the cache in place (`native_attention`).

Invariant: `Layers` and `LayersOverCache` hold the tensors whose addresses they gave away, and a step writes to its own cache alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed.kernels import native

_Address = ctypes.c_void_p
_Int = ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = [("weight", _Address), ("scales", _Address), ("bias", _Address)] + [
        (name, _Int) for name in ("bits", "group_size", "rows", "width")
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Address) for name in ("before_attention", "before_mlp", "query_norm", "key_norm")),
        *((name, _Linear) for name in ("query", "key", "value", "out", "gate", "up", "down")),
        *((name, _Address) for name in ("keys", "values", "key_scales", "value_scales")),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in "num_layers hidden heads shared dim capacity batch num_threads".split()),
        ("eps", ctypes.c_double),
    ]


Cache = tuple[Tensor, ...]
"""A layer's buffers."""

_CACHED = ("keys", "values", "key_scales", "value_scales")


@dataclass(frozen=True)
class Weight:
    """A weight [rows, width] as it rests: fp32, or integers of `bits` with fp32 `scales` of groups; `bias` fp32 or None."""

    values: Tensor
    rows: int
    width: int
    bits: int = 32
    group_size: int = 1
    scales: Tensor | None = None
    bias: Tensor | None = None

    def struct(self) -> _Linear:
        """As the loops read it."""
        return _Linear(
            _address(self.values), _address(self.scales), _address(self.bias),
            self.bits, self.group_size, self.rows, self.width,
        )  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One decoder layer's weights; norms are fp32 [hidden], or [dim] for queries' and keys'."""

    before_attention: Tensor
    before_mlp: Tensor
    query: Weight
    key: Weight
    value: Weight
    out: Weight
    gate: Weight
    up: Weight
    down: Weight
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


class Layers:
    """A decoder's layers, ready to be stepped; of one decoder any number of caches, and of threads, at a time."""

    def __init__(self, layers: Sequence[Layer], *, heads: int, shared: int, dim: int, eps: float) -> None:
        self._held = list(layers)
        self._structs = (_Layer * len(layers))()
        for struct, layer in zip(self._structs, layers, strict=True):
            for name in ("before_attention", "before_mlp", "query_norm", "key_norm"):
                setattr(struct, name, _address(getattr(layer, name)))
            for name in ("query", "key", "value", "out", "gate", "up", "down"):
                setattr(struct, name, getattr(layer, name).struct())
        hidden = layers[0].before_attention.numel()
        self._shape = _Shape(len(layers), hidden, heads, shared, dim, 0, 0, 1, eps)

    def over(self, caches: Sequence[Cache]) -> LayersOverCache:
        """These layers over one cache: of each layer keys and values [batch, shared, capacity, dim], and for int8 the scales of both
        [batch, shared, capacity]; all else fp32, all contiguous."""
        structs = type(self._structs).from_buffer_copy(self._structs)
        for struct, cache in zip(structs, caches, strict=True):
            for name, part in zip(_CACHED, cache, strict=False):
                setattr(struct, name, _address(part))
        shape = _Shape.from_buffer_copy(self._shape)
        shape.batch, shape.capacity = caches[0][0].shape[0], caches[0][0].shape[2]
        return LayersOverCache(self, tuple(caches), structs, shape)


@dataclass(frozen=True)
class LayersOverCache:
    """Layers with the buffers of one cache."""

    layers: Layers
    caches: tuple[Cache, ...]
    structs: ctypes.Array[_Layer]
    shape: _Shape

    def are_over(self, caches: Sequence[Cache]) -> bool:
        """Whether these are the buffers."""
        return all(new[0] is old[0] for new, old in zip(caches, self.caches, strict=True))

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, ranges: Tensor, position: int) -> None:
        """x [batch, hidden] becomes what the last layer gives, in place; keys and values are written to `position` of the cache.

        cos, sin [batch, dim]; ranges [batch, 2] int64: the first position a sequence sees, and position + 1. All fp32 (but ranges)
        and contiguous.
        """
        self.shape.num_threads = torch.get_num_threads()
        library = native.library()
        assert library is not None, "is_there() says whether there is a library"
        given = (_Address(t.data_ptr()) for t in (x, cos, sin, ranges))
        library.ds_decode_layers(self.structs, ctypes.byref(self.shape), *given, _Int(position))


def is_there() -> bool:
    """Whether the loops were compiled."""
    return native.library() is not None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

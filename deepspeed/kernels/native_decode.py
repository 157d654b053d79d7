"""One new token of each sequence through all layers of a decoder, compiled: one call for a token, whatever the number of layers.

Used by `inference.fused`, which describes a model's layers once (`Layers`) and calls `step` for each token. Products read weights as they
rest, in fp32, bf16, int8 or int4 (`native_products`), attention reads the cache in place (`native_attention`).

Invariant: `Layers` holds the tensors whose addresses it gave away.
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
    """A decoder's layers, ready to be stepped."""

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
        self._caches: list[tuple[Tensor, ...]] = []

    def step(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        ranges: Tensor,
        caches: Sequence[tuple[Tensor, ...]],
        position: int,
    ) -> None:
        """x [batch, hidden] becomes what the last layer gives, in place; keys and values are written to `position` of the caches.

        cos, sin [batch, dim]; ranges [batch, 2] int64: the first position a sequence sees, and position + 1. caches: of each layer
        keys and values [batch, shared, capacity, dim], and for int8 the scales of both [batch, shared, capacity]. All fp32 (but ranges)
        and contiguous.
        """
        shape = self._shape
        if len(caches) != len(self._caches) or any(
            new[0] is not old[0] for new, old in zip(caches, self._caches, strict=True)
        ):
            for struct, cache in zip(self._structs, caches, strict=True):
                for name, part in zip(
                    ("keys", "values", "key_scales", "value_scales"), (*cache, None, None), strict=False
                ):
                    setattr(struct, name, _address(part))
            self._caches = list(caches)
            shape.capacity = caches[0][0].shape[2]
        shape.batch, shape.num_threads = x.shape[0], torch.get_num_threads()
        library = native.library()
        assert library is not None, "is_there() says whether there is a library"
        library.ds_decode_layers(
            self._structs, ctypes.byref(shape), *(_Address(t.data_ptr()) for t in (x, cos, sin, ranges)), _Int(position)
        )

    def forget(self) -> None:
        """Hold no cache any more."""
        self._caches = []


def is_there() -> bool:
    """Whether the loops were compiled."""
    return native.library() is not None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()

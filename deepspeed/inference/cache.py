"""A cache of keys and values that grows in place, for decoding: Hugging Face's dynamic cache, without a copy for each token.

`adopt` turns the layers of a cache that Hugging Face's `generate` made into these at the first token that is decoded, keeping what is in
them; everything else that is done to a cache (reordering beams, cropping, repeating) is theirs. What those leave behind is
copied into new buffers before the next token.

Invariant: `keys` and `values` are what Hugging Face's layer would hold, and tensors that were `keys` once keep their values: where the two
are not the very views that were made last, a script may still hold those, so that nothing is written behind what is there.
A row is a sequence: another scheduler may hand in rows of its own, with ranges that say which positions each sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from deepspeed.kernels.pages import empty_rows, in_large_pages

STEP = 256
"""Positions that a buffer grows by at least; it grows by half where that is more."""


_LARGE_HEAD = 4 << 20
"""Bytes of a head's positions from which on large pages are asked for: below, room to grow would be held as if it were written."""


def new_buffer(part: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    """[batch, heads, capacity, ...] unwritten, after a part [batch, heads, positions, ...]."""
    made = empty_rows((*part.shape[:2], capacity, *part.shape[3:]), part, dtype)
    return in_large_pages(made) if made.stride(1) * made.itemsize >= _LARGE_HEAD else made


def is_read_only(buffer: Tensor) -> bool:
    """Whether it was made in `torch.inference_mode`, outside of which torch refuses to write to it."""
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, in buffers [batch, heads, capacity, dim]."""

    keys: Any
    values: Any
    buffers: tuple[Tensor, Tensor] | None = None
    _views: tuple[Any, Any] | None = None
    """`keys` and `values` as this class left them."""

    @property
    def length(self) -> int:
        """Positions held."""
        return int(self.keys.shape[-2])

    @property
    def batch(self) -> int:
        """Sequences."""
        return int(self.keys.shape[0])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; what is held then."""
        if not self.is_initialized or self.keys is None or self.keys.dim() != 4:
            found: Any = super().update(key_states, value_states, *args, **kwargs)
            return found
        length, more = self.keys.shape[-2], key_states.shape[-2]
        keys, values = self.room(more)
        keys[:, :, length : length + more] = key_states
        values[:, :, length : length + more] = value_states
        self.grow_to(length + more)
        return self.keys, self.values

    def room(self, more: int) -> tuple[Tensor, Tensor]:
        """The buffers, beginning with what is held, with room for so many positions more."""
        held = self.keys, self.values
        length = held[0].shape[-2]
        own = self.buffers
        is_ours = self._views is not None and held[0] is self._views[0] and held[1] is self._views[1]
        if own is None or not is_ours or own[0].shape[-2] < length + more or is_read_only(own[0]):
            capacity = length + more + max(STEP, (length + more) // 2)
            made = [new_buffer(part, capacity, part.dtype) for part in held]
            for new, part in zip(made, held, strict=True):
                new[:, :, :length] = part
            own = self.buffers = made[0], made[1]
            self.grow_to(length)
        return own

    def grow_to(self, length: int) -> None:
        """Hold the first so many positions of the buffers."""
        assert self.buffers is not None, "room() makes them"
        keys, values = (buffer.narrow(2, 0, length) for buffer in self.buffers)
        self.keys, self.values = self._views = keys, values


def adopt(cache: Any) -> list[GrowingLayer] | None:
    """The layers of a cache as growing ones, of one length; None for caches of other kinds, and empty ones."""
    if type(cache) is not DynamicCache:
        return None
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            made = GrowingLayer()
            made.__dict__.update(layer.__dict__)
            cache.layers[index] = made
    layers = [layer for layer in cache.layers if type(layer) is GrowingLayer and layer.is_initialized]
    return layers if len(layers) == len(cache.layers) and _are_alike(layers) else None


def _are_alike(layers: list[GrowingLayer]) -> bool:
    first = layers[0].keys if layers else None
    return first is not None and all(
        layer.keys.shape == first.shape == layer.values.shape and layer.keys.dtype is torch.float32 for layer in layers
    )

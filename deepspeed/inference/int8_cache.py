"""A cache of keys and values in int8, a scale for each position and head: a quarter of fp32, half of bf16, but for the scales.

`new_cache` makes what the engine hands to Hugging Face's `generate` where the configuration's kv_cache is int8: their dynamic cache, whose layers are
these. The compiled step (`fused`) writes and reads the integers in place; any other attention is given the layer's keys and values made
whole, for that layer alone and that moment. Beams, cropping and repeating move integers. Windows, and what a decoder remembers of an
encoder, stay as they are.

Invariant: an element is within half a step of what was handed in, whoever wrote it; the format is `kernels.reference.quantize`'s, a
group for each head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from deepspeed.inference.cache import STEP, is_read_only, new_buffer
from deepspeed.kernels.reference.quantize import Quantized
from deepspeed.kernels.table import pick
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import warn_once

_Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Keys and values [batch, heads, capacity, dim] int8, and the scales of both [batch, heads, capacity] fp32."""


class Int8Layer(DynamicLayer):
    """One layer's keys and values. `keys` and `values` are whole ones, made anew each time they are read."""

    parts: _Parts | None = None
    """Buffers, of which the first `length` positions are held."""
    length: int = 0
    _dtype: torch.dtype = torch.float32

    @property
    def keys(self) -> Any:
        """[batch, heads, length, dim] in the model's dtype; None before anything is held."""
        return None if self.parts is None else self._whole(0)

    @keys.setter
    def keys(self, keys: Any) -> None:
        _refuse_assignment("keys", keys)
        self.parts, self.length = None, 0

    @property
    def values(self) -> Any:
        """As `keys`."""
        return None if self.parts is None else self._whole(1)

    @values.setter
    def values(self, values: Any) -> None:
        _refuse_assignment("values", values)

    @property
    def batch(self) -> int:
        """Sequences."""
        return 0 if self.parts is None else self.parts[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Of what is held, without room to grow."""
        return sum(part.narrow(2, 0, self.length).numel() * part.itemsize for part in self.parts or ())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; what is held then, whole."""
        self.is_initialized, self.device, self._dtype = True, key_states.device, key_states.dtype
        more = key_states.shape[-2]
        if self.parts is None:
            self.parts = _room_for(key_states, value_states)
        room = self.room(more)
        for index, states in enumerate((key_states, value_states)):
            found: Quantized = pick("quantize", states.device.type)(states.contiguous(), states.shape[-1])
            room[index].narrow(2, self.length, more).copy_(found.values.view(states.shape))
            room[index + 2].narrow(2, self.length, more).copy_(found.scales.view(states.shape[:3]))
        self.length += more
        return self._whole(0), self._whole(1)

    def room(self, more: int) -> _Parts:
        """The buffers, with room for so many positions more."""
        assert self.parts is not None, "the first update makes them"
        if self.parts[0].shape[2] < self.length + more or is_read_only(self.parts[0]):
            capacity = self.length + more + max(STEP, (self.length + more) // 2)
            self._replace(lambda part: _grown(part, self.length, capacity))
        return self.parts

    def grow_to(self, length: int) -> None:
        """Hold the first so many positions."""
        self.length = length

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions; their number is negative, as Hugging Face has it."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # refuses
        self.length = max(self.length + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Each sequence becomes another's successor."""
        self._replace(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        self._replace(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the sequences."""
        self._replace(lambda part: part[indices, ...])

    def offload(self) -> None:
        """Into main memory."""
        self._replace(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the device."""
        self._replace(lambda part: part.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Hold nothing."""
        self.parts, self.length, self.is_initialized = None, 0, False

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.parts is not None:
            keys, values, key_scales, value_scales = map(change, self.parts)
            self.parts = keys, values, key_scales, value_scales

    def _whole(self, index: int) -> Tensor:
        assert self.parts is not None, "asked for by whoever looked"
        values, scales = (self.parts[at].narrow(2, 0, self.length) for at in (index, index + 2))
        return (values.float() * scales.unsqueeze(-1)).to(self._dtype)


def _refuse_assignment(name: str, given: Any) -> None:
    if given is not None:
        raise DeepSpeedError(
            f"{name} of a cache in int8 were assigned: its layers hold integers, and their scales.\n"
            "  Use the cache's crop, reorder_cache and batch_select_indices, or init_inference without kv_cache = int8."
        )


def _room_for(keys: Tensor, values: Tensor) -> _Parts:
    capacity = keys.shape[2] + STEP
    made = [new_buffer(part, capacity, torch.int8) for part in (keys, values)]
    scales = [new_buffer(part[..., 0], capacity, torch.float32) for part in (keys, values)]
    return made[0], made[1], scales[0], scales[1]


def _grown(part: Tensor, length: int, capacity: int) -> Tensor:
    made = new_buffer(part, capacity, part.dtype)
    made[:, :, :length] = part[:, :, :length]
    return made


def adopt_int8(cache: Any) -> list[Int8Layer] | None:
    """The layers of a cache in int8, of one length; None for caches of other kinds, and empty ones."""
    layers = [layer for layer in getattr(cache, "layers", ()) if type(layer) is Int8Layer and layer.parts is not None]
    if type(cache) is not DynamicCache or not layers or len(layers) != len(cache.layers):
        return None
    first = layers[0].parts
    assert first is not None, "chosen above"
    alike = all(
        layer.parts is not None and layer.length == layers[0].length and layer.parts[0].shape == first[0].shape
        for layer in layers
    )
    return layers if alike and first[0].shape == first[1].shape and first[0].is_contiguous() else None


def new_cache(module: Any) -> Any:
    """An empty cache for a model's `generate`; None, and one warning, where no layer of it would be in int8."""
    config = getattr(module, "config", None)
    if config is None or not getattr(module, "_supports_default_dynamic_cache", lambda: True)():
        warn_once(f"kv_cache.dtype = int8 has no effect: {type(module).__name__} has a cache of its own.")
        return None
    decoder = config.get_text_config(decoder=True)
    cache = DynamicCache(config=decoder)
    cache.layers = [Int8Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = Int8Layer
    elif not any(isinstance(layer, Int8Layer) for layer in cache.layers):
        warn_once(f"kv_cache.dtype = int8 has no effect: no layer of {type(module).__name__} keeps all positions.")
        return None
    return EncoderDecoderCache(cache, DynamicCache(config=decoder)) if config.is_encoder_decoder else cache

"""Weights that other libraries quantized, made whole as they are read: GPTQ, AWQ, bitsandbytes and 8-bit floats, as their files have them.

`found` puts `unpacked` around weights that were opened; names, shapes and reading are then those of an ordinary model, whatever reads them
(and whatever it quantizes them to). No library has to be installed: the layouts are facts.

    GPTQ    qweight [in / n, out] int32, n neighbours of a column in a word, the first lowest; qzeros [groups, out / n]; scales
            [groups, out]; g_idx [in], the group of each input. w = scale * (q - (zero + 1) mod 2^bits); in "gptq_v2" without the 1
    AWQ     qweight [in, out / 8] int32, of a row's 8 neighbours 0 2 4 6 1 3 5 7, the first lowest; qzeros [groups, out / 8] alike;
            scales [groups, out]. w = scale * (q - zero)
    int8    of bitsandbytes: weight [out, in] int8 and SCB [out]. w = q * SCB * (1 / 127)
    nf4, fp4    weight [bytes, 1] uint8, the first of two in the high bits; absmax of blocks, itself in 8 bits or not; quant_map;
            the rest in quant_state, as JSON
    float8  weight [out, in] of 8-bit floats, and weight_scale_inv or weight_scale: one number, one of each row, or of each block
            of weight_block_size rows and columns (DeepSeek's). w = q * scale

Invariant: a weight is what the library's own formula gives, bit for bit, in the dtype of its scales (4 bits: of its quant_state).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Box
from deepspeed.inference.weights import Held, Weights, cut
from deepspeed.utils.dtypes import parse_dtype
from deepspeed.utils.errors import CheckpointError

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where, in a word of AWQ, each of 8 neighbours lies."""
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("scale_inv", "scale")
_OF_127 = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it."""


class _Layout(Protocol):
    """One weight's stored tensors, and what they are together."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def held(self) -> Held: ...

    def whole(self, weights: Weights) -> Tensor: ...


def _integers(words: Tensor, bits: int) -> Tensor:
    """[..., n] int32 -> [..., n, 32 / bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts) & (2**bits - 1)


@dataclass(frozen=True)
class _Gptq:
    stem: str
    held: Held
    parts: tuple[str, ...]
    bits: int
    offset: int

    def whole(self, weights: Weights) -> Tensor:
        words, zeros, scales = (weights.read(f"{self.stem}.{part}", None) for part in ("qweight", "qzeros", "scales"))
        rows = _integers(words, self.bits).transpose(1, 2).flatten(0, 1)
        zero = (_integers(zeros, self.bits).flatten(1) + self.offset) & (2**self.bits - 1)
        width = self.held.shape[1]
        groups = torch.arange(width) // -(-width // scales.shape[0])
        if f"{self.stem}.g_idx" in self.parts:
            groups = weights.read(f"{self.stem}.g_idx", None).long()
        return (scales[groups] * (rows - zero[groups]).to(scales.dtype)).t().contiguous()


@dataclass(frozen=True)
class _Awq:
    stem: str
    held: Held
    parts: tuple[str, ...]

    def whole(self, weights: Weights) -> Tensor:
        words, zeros, scales = (weights.read(f"{self.stem}.{part}", None) for part in ("qweight", "qzeros", "scales"))
        rows, zero = (_integers(part, 4)[..., list(_AWQ_PLACES)].flatten(1) for part in (words, zeros))
        each = rows.shape[0] // scales.shape[0]
        whole = (rows - zero.repeat_interleave(each, 0)).to(scales.dtype) * scales.repeat_interleave(each, 0)
        return whole.t().contiguous()


@dataclass(frozen=True)
class _Int8:
    stem: str
    held: Held
    parts: tuple[str, ...]

    def whole(self, weights: Weights) -> Tensor:
        values, largest = (weights.read(f"{self.stem}.{part}", None) for part in ("weight", "SCB"))
        return values * largest.float().view(-1, 1) * _OF_127


@dataclass(frozen=True)
class _FourBits:
    stem: str
    held: Held
    parts: tuple[str, ...]
    state: Mapping[str, Any]

    def whole(self, weights: Weights) -> Tensor:
        def read(part: str) -> Tensor:
            return weights.read(f"{self.stem}.{part}", None)

        largest = read("absmax")
        if largest.dtype is torch.uint8:
            each = int(self.state["nested_blocksize"])
            of_blocks = read("nested_absmax").repeat_interleave(each)[: largest.numel()]
            largest = read("nested_quant_map")[largest.long()] * of_blocks + float(self.state["nested_offset"])
        packed = weights.read(self.stem, None).flatten().view(torch.uint8)
        numel = self.held.shape[0] * self.held.shape[1]
        places = torch.stack([packed >> 4, packed & 15], 1).flatten()[:numel].long()
        factors = largest.float().repeat_interleave(int(self.state["blocksize"]))[:numel]
        return (read("quant_map").float()[places] * factors).to(self.held.dtype).view(self.held.shape)


@dataclass(frozen=True)
class _Float8:
    name: str
    held: Held
    parts: tuple[str, ...]
    block: tuple[int, int]

    def whole(self, weights: Weights) -> Tensor:
        values, scale = (weights.read(part, None).float() for part in self.parts)
        if scale.numel() == 1:
            return values * scale.view(())
        scale = scale.view(*scale.shape, 1) if scale.dim() < values.dim() else scale
        for dim, each in zip((-2, -1), self.block, strict=True):
            scale = scale.repeat_interleave(each, dim).narrow(dim, 0, values.shape[dim])
        return values * scale


class Unpacked:
    """See `Weights`."""

    def __init__(self, inner: Weights, layouts: Mapping[str, _Layout]) -> None:
        self.what = inner.what
        self._inner, self._layouts = inner, layouts
        hidden = {part for layout in layouts.values() for part in layout.parts}
        self.held = {name: held for name, held in inner.held.items() if name not in hidden}
        self.held |= {name: layout.held for name, layout in layouts.items()}

    def read(self, name: str, box: Box | None, dtype: torch.dtype | None = None) -> Tensor:
        """See `Weights`. One weight is whole for that moment."""
        layout = self._layouts.get(name)
        if layout is None:
            return self._inner.read(name, box, dtype)
        part = cut(layout.whole(self._inner), box)
        return part if dtype is None else part.to(dtype)

    def pieces(self, name: str, box: Box | None, numel: int) -> Iterator[Tensor]:
        """See `Weights`."""
        return iter([self.read(name, box).view(-1)]) if name in self._layouts else self._inner.pieces(name, box, numel)


def unpacked(weights: Weights, config: Mapping[str, Any] | None = None) -> Weights:
    """The weights as an ordinary model has them; themselves where nothing is packed. `config`: the section `quantization_config` of
    the model's config.json, where there is one.

    Raises CheckpointError, naming the layer, for a layout that is none of these.
    """
    layouts: dict[str, _Layout] = {}
    for name in weights.held:
        stem, _, last = name.rpartition(".")
        if last == "qweight":
            layouts[f"{stem}.weight"] = _of_words(weights, stem, config or {})
        elif last == "SCB":
            parts = _present(weights, stem, "weight SCB weight_format")
            layouts[f"{stem}.weight"] = _Int8(stem, Held(weights.held[parts[0]].shape, torch.float32), parts)
        elif any(name.endswith(f".{state}") for state in _STATES):
            state = next(state for state in _STATES if name.endswith(f".{state}"))
            whole = name.removesuffix(f".{state}")
            layouts[whole] = _of_state(weights, whole, name)
        elif weights.held[name].dtype in _FLOAT8:
            scale = next((f"{name}_{end}" for end in _SCALES if f"{name}_{end}" in weights.held), None)
            if scale is not None:
                layouts[name] = _of_float8(weights, name, scale, config or {})
    return Unpacked(weights, layouts) if layouts else weights


def _of_float8(weights: Weights, name: str, scale: str, config: Mapping[str, Any]) -> _Float8:
    shape, of_scale = weights.held[name].shape, weights.held[scale].shape
    rows, columns = (1, 1, *shape)[-2:]
    given = config.get("weight_block_size") or (128, 128)
    is_of_rows = of_scale in ((rows,), (rows, 1))
    block = (1, columns) if is_of_rows else (int(given[0]), int(given[1]))
    fitting = (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if not (is_of_rows or of_scale == fitting or math.prod(of_scale) == 1):
        raise CheckpointError(
            f"{weights.what}: {name} is {list(shape)} in 8-bit floats, and {scale} is {list(of_scale)}: neither one number, one of each "
            f"row, nor of blocks of {block[0]} by {block[1]}.\n  quantization_config.weight_block_size in config.json says the blocks."
        )
    return _Float8(name, Held(shape, torch.float32), (name, scale), block)


def _present(weights: Weights, stem: str, parts: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{part}" for part in parts.split() if f"{stem}.{part}" in weights.held)


def _of_words(weights: Weights, stem: str, config: Mapping[str, Any]) -> _Layout:
    parts = _present(weights, stem, "qweight qzeros scales g_idx")
    shapes = {part.rpartition(".")[2]: weights.held[part].shape for part in parts}
    if not {"qweight", "qzeros", "scales"} <= set(shapes):
        missing = sorted({"qweight", "qzeros", "scales"} - set(shapes))
        raise CheckpointError(f"{weights.what}: {stem} has a qweight, and no {' and no '.join(missing)}.")
    (rows, columns), out = shapes["qweight"], shapes["scales"][1]
    per_word = out // max(shapes["qzeros"][1], 1)
    dtype = weights.held[f"{stem}.scales"].dtype
    if columns * 8 == out and per_word == 8:
        return _Awq(stem, Held((out, rows), dtype), parts)
    if columns != out or per_word not in (4, 8, 16) or out % per_word:
        raise CheckpointError(
            f"{weights.what}: {stem}.qweight is {[rows, columns]} beside scales {list(shapes['scales'])} and qzeros "
            f"{list(shapes['qzeros'])}: neither GPTQ in 2, 4 or 8 bits nor AWQ in 4."
        )
    offset = 0 if str(config.get("checkpoint_format")) == "gptq_v2" else 1
    return _Gptq(stem, Held((out, rows * per_word), dtype), parts, 32 // per_word, offset)


def _of_state(weights: Weights, name: str, state_name: str) -> _Layout:
    try:
        state = json.loads(bytes(weights.read(state_name, None).tolist()))
        shape, dtype = tuple(int(size) for size in state["shape"]), parse_dtype(state["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{weights.what}: {state_name} is no description of a weight: {error}.") from error
    held = [part for part in weights.held if part == name or part.startswith(f"{name}.")]
    return _FourBits(name, Held(shape, dtype), tuple(held), state)

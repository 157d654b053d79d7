"""Weights into a module, parameter by parameter: a rank reads its own part, in the dtype the module was cast to.

Made by the engine before the module is changed: everything that can be refused is refused then (names that are missing, shapes that
differ). After the module was cut and cast, `fill` gives a layer its weights, which `quantized` asks for one by one, so that
memory holds the parts of this rank and one tensor more; `quantized` reads a weight that will be, without ever holding it whole; `fill_rest` reads what is left, and computes buffers that no checkpoint has.

Invariant: a parameter that was on "meta" becomes a new one with the old one's mark, in every module that had it; another keeps its
object. Where reading fails, the engine puts the module back (`undo`), where it can.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint.boxes import Box, box_of
from deepspeed.inference.joined import Parts
from deepspeed.inference.names import Recipe, recipes_for
from deepspeed.inference.weights import Weights
from deepspeed.mesh import marks
from deepspeed.quant.linear import QuantizedWeight, piece_numel
from deepspeed.quant.spec import Spec
from deepspeed.utils.dtypes import dtype_name
from deepspeed.utils.errors import CheckpointError, DeepSpeedConfigError
from deepspeed.utils.logging import warn_once


@dataclass
class _Place:
    """One tensor of the module: who has it, and how it is read."""

    name: str
    tensor: Tensor
    owners: list[tuple[nn.Module, str]]
    recipe: Recipe
    weights: Weights
    parts: Parts | None = None
    """Files of ranks, which say from where once the parameter is cut."""

    @property
    def cuts(self) -> tuple[marks.Cut, ...]:
        """How the parameter is cut by now."""
        return marks.of(self.tensor).cuts if isinstance(self.tensor, nn.Parameter) else ()

    @property
    def whole(self) -> list[int]:
        """Its shape on all ranks together."""
        shape = list(self.tensor.shape)
        for cut in self.cuts:
            shape[cut.dim] = cut.whole
        return shape


@dataclass
class Loader:
    """What will be read into one module."""

    module: nn.Module
    what: str
    places: dict[int, _Place] = field(default_factory=dict)

    def fill(self, layer: nn.Module) -> None:
        """Read a layer's own parameters."""
        for param in list(layer._parameters.values()):
            if param is not None and (place := self.places.pop(id(param), None)) is not None:
                self._read(place)

    def quantized(self, layer: nn.Module, spec: Spec) -> QuantizedWeight | None:
        """A layer's weight, quantized piece by piece as it is read; None where it is not among what is read, or stored otherwise."""
        param = layer._parameters.get("weight")
        place = None if param is None else self.places.get(id(param))
        if place is None or param is None or not param.is_floating_point() or not param.numel():
            return None
        source, box = _source(place)
        found = (
            source.held[place.recipe.stored].shape if place.recipe.converter is None and box is None else param.shape
        )
        if tuple(found) != tuple(param.shape):
            return None  # read as it is, and refused there
        pieces = place.recipe.pieces(source, box, piece_numel(spec), param.dtype)
        made = QuantizedWeight.of_pieces(param.shape, param.dtype, pieces, spec)
        del self.places[id(param)]
        return made

    def fill_rest(self, put: Callable[[nn.Module], None] = lambda layer: None) -> None:
        """Read everything that is left, module by module; `put` is told of each that is filled."""
        for layer in list(self.module.modules()):
            self.fill(layer)
            put(layer)
        for key in list(self.places):
            self._read(self.places.pop(key))
        _compute_buffers(self.module)

    def _read(self, place: _Place) -> None:
        weights, box = _source(place)
        values = place.recipe.read(weights, box, place.tensor.dtype)
        if tuple(values.shape) != tuple(place.tensor.shape):
            raise CheckpointError(
                f"{place.name} is {list(values.shape)} in {place.weights.what}, and {list(place.tensor.shape)} here."
            )
        for owner, name in place.owners:
            if name in owner._buffers:
                owner._buffers[name] = values.to(place.tensor.device) if not place.tensor.is_meta else values
        if not isinstance(place.tensor, nn.Parameter):
            return
        if not place.tensor.is_meta:
            place.tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            place.tensor.data = values.to(place.tensor.device)
            return
        made = nn.Parameter(values, requires_grad=False)
        made.__dict__.update(place.tensor.__dict__, _is_hf_initialized=True)
        for owner, name in place.owners:
            owner._parameters[name] = made


def _source(place: _Place) -> tuple[Weights, Box | None]:
    """Where the parameter's part is read, and which part of what is there."""
    cuts = place.cuts
    box = box_of(place.whole, {cut.dim: list(cut.ranges) for cut in cuts}) if cuts else None
    if place.parts is None:
        return place.weights, box
    weights, is_part = place.parts.source(place.recipe.stored, place.whole, box)
    return weights, None if is_part else box


def make_loader(module: nn.Module, weights: Weights | Parts) -> Loader:
    """Match weights to a module that is whole yet. Raises CheckpointError for missing names and shapes that differ."""
    if isinstance(weights, Parts):
        return _of_parts(module, weights)
    tensors = _tensors(module)
    recipes, unused = recipes_for(module, [name for names, _ in tensors.values() for name in names], weights)
    loader = Loader(module, weights.what)
    missing: list[str] = []
    for key, (names, place) in tensors.items():
        of_names = [recipes[name] for name in names if name in recipes]
        if of_names:
            recipe = of_names[0]
            _refuse_integers(place[0], recipe, weights)
            _refuse_two_values(module, of_names, weights)
            loader.places[key] = _Place(names[0], place[0], place[1], recipe, weights)
        elif not any(map(_ignored(module, "_keys_to_ignore_on_load_missing"), names)):
            missing.append(names[0])
    _refuse_missing(module, missing, unused, weights.what)
    for item in loader.places.values():
        found, wanted = item.recipe.shape(item.weights), tuple(item.tensor.shape)
        if found != wanted:
            raise CheckpointError(
                f"{item.name} is {list(found)} in {weights.what}, and {list(wanted)} in {type(module).__name__}.\n"
                "  Build the model from the configuration that the checkpoint was saved with; nothing was loaded."
            )
    ignored = _ignored(module, "_keys_to_ignore_on_load_unexpected")
    left = [name for name in unused if not ignored(name) and not name.endswith("inv_freq")]
    if left:
        warn_once(
            f"{weights.what}: {len(left)} tensors have no place in {type(module).__name__}: {', '.join(left[:4])}."
        )
    return loader


def _refuse_integers(tensor: Tensor, recipe: Recipe, weights: Weights) -> None:
    """Raise CheckpointError where integers are stored for numbers: packed by a library whose scales are not known here."""
    names = [name for _, sources in recipe.sources for name in sources] or [recipe.stored]
    name = next((name for name in names if not weights.held[name].dtype.is_floating_point), None)
    if name is not None and tensor.is_floating_point():
        raise CheckpointError(
            f"{name} holds {dtype_name(weights.held[name].dtype)} in {weights.what}, and {recipe.name} has numbers with fractions; nothing was "
            "loaded.\n  Save it dequantized. GPTQ, AWQ, bitsandbytes and 8-bit floats with their scales are read as they are."
        )


def _refuse_two_values(module: nn.Module, recipes: list[Recipe], weights: Weights) -> None:
    """Raise CheckpointError where names that share one parameter have two different tensors, of which one would be lost."""
    first = recipes[0]
    for other in recipes[1:]:
        if first.converter is None and other.converter is None and not _are_equal(weights, first.stored, other.stored):
            raise CheckpointError(
                f"{first.name} and {other.name} are one parameter of {type(module).__name__}, and two that differ in {weights.what}; nothing "
                "was loaded.\n  Build the model with tie_word_embeddings=False in its configuration, or remove the one that is not meant."
            )


def _are_equal(weights: Weights, name: str, other: str) -> bool:
    """Whether two stored tensors have the same values, read some rows at a time."""
    shape = weights.held[name].shape
    if shape != weights.held[other].shape:
        return False
    if name == other or not shape:
        return name == other or torch.equal(*(weights.read(each, None, torch.float64) for each in (name, other)))
    rows = max(_COMPARED // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], rows):
        box = box_of(shape, {0: [(start, min(start + rows, shape[0]))]})
        if not torch.equal(*(weights.read(each, box, torch.float32) for each in (name, other))):
            return False
    return True


_COMPARED = 1 << 20
"""Elements that are compared at a time."""


def _of_parts(module: nn.Module, parts: Parts) -> Loader:
    loader = Loader(module, parts.what)
    missing = []
    for key, (names, place) in _tensors(module).items():
        name = next((name for name in names if name in parts.parts.held or name in parts.whole.held), None)
        if name is None:
            missing.append(names[0])
            continue
        source = parts.parts if name in parts.parts.held else parts.whole
        loader.places[key] = _Place(names[0], place[0], place[1], Recipe(name, name), source, parts)
    _refuse_missing(module, missing, sorted(parts.whole.held), parts.what)
    return loader


def _refuse_missing(module: nn.Module, missing: list[str], unused: list[str], what: str) -> None:
    if missing:
        others = f"\n  It has {', '.join(unused[:3])}, which this model has not." if unused else ""
        raise CheckpointError(
            f"{what} lacks {len(missing)} tensors of {type(module).__name__}: {', '.join(missing[:4])}; nothing was loaded."
            f"{others}"
        )


def _ignored(module: nn.Module, attribute: str) -> Callable[[str], bool]:
    patterns = [re.compile(text) for text in getattr(module, attribute, None) or ()]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _tensors(module: nn.Module) -> dict[int, tuple[list[str], tuple[Tensor, list[tuple[nn.Module, str]]]]]:
    """Parameters and saved buffers by identity: their names, the tensor, who has it."""
    found: dict[int, tuple[list[str], tuple[Tensor, list[tuple[nn.Module, str]]]]] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        own: dict[str, Any] = dict(owner._parameters)
        own |= {n: b for n, b in owner._buffers.items() if n not in owner._non_persistent_buffers_set}
        for name, tensor in own.items():
            if tensor is not None:
                names, (_, owners) = found.setdefault(id(tensor), ([], (tensor, [])))
                names.append(f"{prefix}.{name}".lstrip("."))
                if (owner, name) not in owners:
                    owners.append((owner, name))
    return found


def _compute_buffers(module: nn.Module) -> None:
    """Buffers that no checkpoint has (rotary frequencies), where they are on "meta": as Hugging Face's model fills them."""
    left: list[str] = []
    for prefix, owner in module.named_modules():
        on_meta = [name for name, buffer in owner._buffers.items() if buffer is not None and buffer.is_meta]
        if not on_meta:
            continue
        init: Any = getattr(module, "_init_weights", None)
        if init is None:
            left += [f"{prefix}.{name}" for name in on_meta]
            continue
        for name in on_meta:
            owner._buffers[name] = _unset(owner._buffers[name])
        with torch.no_grad():
            init(owner)
        left += [
            f"{prefix}.{name}"
            for name in on_meta
            if (made := owner._buffers[name]) is not None and made.is_floating_point() and bool(made.isnan().any())
        ]
    if left:
        raise DeepSpeedConfigError(
            f"{', '.join(left[:4])} of {type(module).__name__} are computed, not stored, and were made on the meta device.\n"
            "  Build the model with its buffers on the host (include_buffers=False of OnDevice), or whole."
        )


def _unset(buffer: Tensor | None) -> Tensor | None:
    """On the host, with values that show whether somebody set them."""
    if buffer is None or not buffer.is_floating_point():
        return None if buffer is None else torch.zeros_like(buffer, device="cpu")
    return torch.full_like(buffer, float("nan"), device="cpu")

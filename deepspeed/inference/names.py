"""Which stored tensors make which parameter: a recipe for each name of a model.

Asked by `load` before anything is changed. Most names are equal; a Hugging Face model's may lack or have the base model's prefix,
and some families store other tensors than the model has (experts one by one): then its own table of conversions says how one
is made of the others, and shapes are worked out without reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint.boxes import Box
from deepspeed.inference.weights import Weights


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the model is read. `converter`: Hugging Face's, with the stored names by its patterns."""

    name: str
    stored: str
    converter: Any = None
    sources: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def shape(self, weights: Weights) -> tuple[int, ...]:
        """Of the whole tensor."""
        if self.converter is None:
            return weights.held[self.stored].shape
        return tuple(self._convert(lambda name: torch.empty(weights.held[name].shape, device="meta")).shape)

    def read(self, weights: Weights, box: Box | None, dtype: torch.dtype) -> Tensor:
        """The part that a box says, in a dtype."""
        if self.converter is None:
            return weights.read(self.stored, box, dtype)
        whole = self._convert(lambda name: weights.read(name, None))
        for dim, ranges in enumerate(box.ranges if box is not None else ()):
            if ranges != ((0, whole.shape[dim]),):
                whole = torch.cat([whole.narrow(dim, start, stop - start) for start, stop in ranges], dim)
        return whole.contiguous().to(dtype)

    def pieces(self, weights: Weights, box: Box | None, numel: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The same part in order, in flat tensors that are valid until the next (see `Weights`), of a dtype or one that it holds."""
        if self.converter is not None:
            yield self.read(weights, box, dtype).view(-1)
            return
        is_exact = torch.promote_types(weights.held[self.stored].dtype, dtype) == dtype
        for piece in weights.pieces(self.stored, box, numel):
            yield piece if is_exact else piece.to(dtype)

    def _convert(self, read: Any) -> Tensor:
        tensors: Any = {pattern: [read(name) for name in names] for pattern, names in self.sources}
        for operation in self.converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
                full_layer_name=self.name,
                model=None,
                config=None,
                missing_keys=None,
            )
        found = next(value for pattern, value in tensors.items() if pattern in self.name or len(tensors) == 1)
        result: Tensor = found[0] if isinstance(found, list) else found
        return result


def recipes_for(model: nn.Module, wanted: Iterable[str], weights: Weights) -> tuple[dict[str, Recipe], list[str]]:
    """Recipes by the model's names, and the stored names that none uses."""
    known = dict.fromkeys(wanted, True)
    renamings, converters = _conversions(model)
    found: dict[str, Recipe] = {}
    groups: dict[tuple[int, str], dict[str, list[str]]] = {}
    unused: list[str] = []
    for stored in sorted(weights.held, key=_natural):
        name, pattern = _renamed(stored, renamings, converters, getattr(model, "base_model_prefix", None), known)
        index = next((i for i, c in enumerate(converters) if pattern in c.source_patterns), None) if pattern else None
        if stored in known and index is None:
            found[stored] = Recipe(stored, stored)
        elif index is not None:
            groups.setdefault((index, name), {}).setdefault(str(pattern), []).append(stored)
        elif name in known:
            found[name] = Recipe(name, stored)
        else:
            unused.append(stored)
    for (index, name), by_pattern in groups.items():
        converter = converters[index]
        sources = tuple(
            (pattern, tuple(by_pattern[pattern])) for pattern in converter.source_patterns if pattern in by_pattern
        )
        first = converter.target_patterns[0]
        for target in converter.target_patterns:
            full = name.replace(first, target).replace("*.", "0.")
            if full in known:
                found[full] = Recipe(full, full, converter, sources)
    return found, unused


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Hugging Face's renamings and converters for a model; none for other modules, and before it had them."""
    if not hasattr(model, "base_model_prefix"):
        return [], []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return [], []
    loaded: Any = model
    made = get_model_conversion_mapping(loaded)
    converters = [item for item in made if isinstance(item, WeightConverter)]
    return [item for item in made if not isinstance(item, WeightConverter)], converters


def _renamed(
    stored: str, renamings: list[Any], converters: list[Any], prefix: str | None, known: Mapping[str, bool]
) -> tuple[str, str | None]:
    name, pattern = stored, None
    if stored not in known:
        name = stored.removeprefix("module.") if stored.removeprefix("module.") in known else stored
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
        name, pattern = converter.rename_source_key(name)
        if pattern is not None:
            break
    if name in known or not prefix:
        return name, pattern
    without = re.sub(f"^{re.escape(prefix)}\\.", "", name)
    return (without if without in known else f"{prefix}.{name}" if f"{prefix}.{name}" in known else name), pattern

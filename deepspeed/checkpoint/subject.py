"""What is saved and loaded: one model under ZeRO, seen as named flats; and what this rank writes of it.

Made by the engine (`engine.checkpoints`); used by `save` and `load`. A model that is divided (tensor, pipeline
parallelism) is seen whole: parameters have the names and shapes of the whole model, and this rank a box of each.

Invariant: over all ranks, `shares` cover every element of every parameter, buffer and optimizer state exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspeed.checkpoint.boxes import Box, box_of
from deepspeed.checkpoint.container import dtype_key
from deepspeed.checkpoint.manifest import ParameterInfo, Piece
from deepspeed.checkpoint.names import GlobalNames, apart
from deepspeed.checkpoint.writer import Reads
from deepspeed.mesh import Mesh, marks
from deepspeed.utils.errors import CheckpointError
from deepspeed.zero.build import Built
from deepspeed.zero.checkpoint_flats import Flat, states, weights
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.param import real_dtype, stored_shape

BUFFER, VALUE = "buffer", "value"
SMALL_NUMEL = 1 << 16
"""Replicated pieces below this are written whole by one rank rather than in shares by all."""


class NamedBox(NamedTuple):
    """Where this rank's values of a parameter belong: which box of which whole tensor."""

    name: str
    whole: tuple[int, ...]
    box: Box | None


@dataclass(frozen=True)
class Subject:
    """A model under ZeRO. `optimizer` is None in an engine that only evaluates.

    Names that are asked for and given are those in the whole model (`name_of`), but where a text says "local".
    """

    module: nn.Module
    built: Built
    optimizer: ZeroOptimizer | None
    mesh: Mesh
    apart: frozenset[str] = frozenset()
    """Names of which each model-parallel rank stores its own."""
    elsewhere: frozenset[str] = frozenset()
    """Names that this rank holds and another model-parallel rank writes."""

    @property
    def is_first_of_model(self) -> bool:
        """Whether this rank tells what all of its data-parallel group know; of experts, all who hold the same."""
        return self.mesh.rank("average") == 0 or (self.mesh.size("experts") > 1 and self.mesh.rank("expert_shard") == 0)

    @cached_property
    def _global(self) -> GlobalNames:
        return GlobalNames(self.module)

    def name_of(self, local: str) -> str:
        """The name in a checkpoint of a local parameter, buffer or module."""
        name = self._global(local)
        return apart(name, self.mesh.rank("model")) if name in self.apart or local in self._places_unknown else name

    def box_of(self, local: str) -> NamedBox:
        """Where a local parameter belongs."""
        return self._boxes[local]

    @property
    def is_cut_unknown(self) -> bool:
        """Whether the model is divided and this rank holds, or may hold, pieces of which nobody said where they belong."""
        known = any(marks.of(param).cuts for param in self.module.parameters())
        return self.mesh.size("model") > 1 and (bool(self._places_unknown) or not known)

    @cached_property
    def _places_unknown(self) -> frozenset[str]:
        """Local parameters that are cut, and nobody said where."""
        if self.mesh.size("model") == 1:
            return frozenset()
        named = self.module.named_parameters(remove_duplicate=False)
        return frozenset(name for name, param in named if any(not cut.ranges for cut in marks.of(param).cuts))

    @cached_property
    def _boxes(self) -> dict[str, NamedBox]:
        found = {}
        for local, param in self.module.named_parameters(remove_duplicate=False):
            whole, cuts = list(stored_shape(param)), {}
            for cut in marks.of(param).cuts if local not in self._places_unknown else ():
                if cut.ranges:
                    whole[cut.dim], cuts[cut.dim] = cut.whole, cut.ranges
            try:
                box = box_of(whole, cuts)
            except ValueError as error:
                raise CheckpointError(f"{local} is marked as cut in a way that cannot be: {error}.") from error
            found[local] = NamedBox(self.name_of(local), tuple(whole), box)
        return found

    def boxes(self) -> dict[str, Box]:
        """The boxes of parameters of which this rank holds a part."""
        return {named.name: named.box for named in self._boxes.values() if named.box is not None}

    def parameters(self) -> dict[str, ParameterInfo]:
        """Every parameter once, under its first name, as it is whole."""
        return {
            self.name_of(name): ParameterInfo(
                dtype_key(real_dtype(p), name), self._boxes[name].whole, not p.requires_grad
            )
            for name, p in self.module.named_parameters()
        }

    def tied_locally(self) -> dict[str, str]:
        """The further local names of parameters that have several, with the first."""
        first = {id(param): name for name, param in self.module.named_parameters()}
        return {
            name: first[id(param)]
            for name, param in self.module.named_parameters(remove_duplicate=False)
            if first[id(param)] != name
        }

    def tied(self) -> dict[str, str]:
        """The further names of parameters that have several."""
        named = ((self.name_of(name), self.name_of(first)) for name, first in self.tied_locally().items())
        return {name: first for name, first in named if name != first}

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the module's state."""
        return {self.name_of(local): buffer for local, buffer in self._local_buffers()}

    def buffers_of_experts(self) -> set[str]:
        """Names of the buffers of experts that no other "experts" rank holds."""
        return {self.name_of(local) for local, _ in self._local_buffers() if self._is_of_expert(local)}

    def _local_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self.module.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}".lstrip("."), buffer

    def _is_of_expert(self, local: str) -> bool:
        """Whether the nearest module around that has parameters has marked ones alone, and its own name in the whole model."""
        owner = local.rpartition(".")[0]
        while owner and not any(True for _ in self.module.get_submodule(owner).parameters()):
            owner = owner.rpartition(".")[0]
        params = list(self.module.get_submodule(owner).parameters())
        return self._global(local) != local and bool(params) and all(marks.of(param).is_expert for param in params)

    def extra_states(self) -> dict[str, Any]:
        """What modules add to their state by `get_extra_state`."""
        return {
            self._global(prefix): module.get_extra_state()
            for prefix, module in self.module.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }

    def flats(self) -> Iterator[Flat]:
        """Everything this rank holds of weights and optimizer states."""
        yield from weights(self.built, self.module, self.mesh)
        if self.optimizer is not None:
            yield from states(self.optimizer, self.mesh)


@dataclass(frozen=True)
class Share:
    """A piece that this rank writes, and where its elements come from."""

    piece: Piece
    dtype: torch.dtype
    read: Reads


def shares(subject: Subject, excluded: frozenset[str] = frozenset()) -> Iterator[Share]:
    """This rank's share of its flats: all of what it alone holds, an equal part of what is replicated."""
    for index, flat in enumerate(subject.flats()):
        low, high = _own_range(flat, index)
        for span in flat.spans:
            start, stop = max(low, span.at), min(high, span.at + span.numel)
            named = subject.box_of(span.name)
            if start < stop and named.name not in excluded and named.name not in subject.elsewhere:
                first = span.in_param + start - span.at
                dtype = dtype_key(flat.dtype, span.name)
                piece = Piece(flat.kind, named.name, dtype, first, first + stop - start, named.box)
                yield Share(piece, flat.dtype, _shifted(flat.read, start))


def _own_range(flat: Flat, index: int) -> tuple[int, int]:
    numel = max((span.at + span.numel for span in flat.spans), default=0)
    if flat.num_replicas > 1 and numel < SMALL_NUMEL:
        return (0, numel) if index % flat.num_replicas == flat.replica else (0, 0)
    return numel * flat.replica // flat.num_replicas, numel * (flat.replica + 1) // flat.num_replicas


def _shifted(read: Reads, by: int) -> Reads:
    return lambda start, numel: read(by + start, numel)


def whole(kind: str, name: str, tensor: Tensor) -> Share:
    """A tensor that this rank writes entirely."""
    flat = tensor.detach().reshape(-1)
    piece = Piece(kind, name, dtype_key(flat.dtype, name), 0, flat.numel())
    return Share(piece, flat.dtype, lambda start, numel: flat.narrow(0, start, numel).cpu())

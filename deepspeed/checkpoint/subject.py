"""What is saved and loaded: one model under ZeRO, seen as named flats; and what this rank writes of it.

Made by the engine's porch (`api`); used by `save` and `load`.

Invariant: over all ranks, `shares` cover every element of every parameter, buffer and optimizer state exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.checkpoint.container import dtype_key
from deepspeed.checkpoint.manifest import ParameterInfo, Piece
from deepspeed.checkpoint.writer import Reads
from deepspeed.mesh import Mesh
from deepspeed.zero.build import Built
from deepspeed.zero.optimizer import ZeroOptimizer
from deepspeed.zero.param import real_dtype, stored_shape
from deepspeed.zero.shards import Flat, states, weights

BUFFER, VALUE = "buffer", "value"
SMALL_NUMEL = 1 << 16
"""Replicated pieces below this are written whole by one rank rather than in shares by all."""


@dataclass(frozen=True)
class Subject:
    """A model under ZeRO. `optimizer` is None in an engine that only evaluates."""

    module: nn.Module
    built: Built
    optimizer: ZeroOptimizer | None
    mesh: Mesh

    def parameters(self) -> dict[str, ParameterInfo]:
        """Every parameter once, under its first name."""
        return {
            name: ParameterInfo(dtype_key(real_dtype(p), name), tuple(stored_shape(p)), not p.requires_grad)
            for name, p in self.module.named_parameters()
        }

    def tied(self) -> dict[str, str]:
        """The further names of parameters that have several."""
        first = {id(param): name for name, param in self.module.named_parameters()}
        return {
            name: first[id(param)]
            for name, param in self.module.named_parameters(remove_duplicate=False)
            if first[id(param)] != name
        }

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the module's state."""
        found: dict[str, Tensor] = {}
        for prefix, module in self.module.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}".lstrip(".")] = buffer
        return found

    def extra_states(self) -> dict[str, Any]:
        """What modules add to their state by `get_extra_state`."""
        return {
            prefix: module.get_extra_state()
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


def shares(flats: Iterable[Flat], excluded: frozenset[str] = frozenset()) -> Iterator[Share]:
    """This rank's share of its flats: all of what it alone holds, an equal part of what is replicated."""
    for index, flat in enumerate(flats):
        low, high = _own_range(flat, index)
        for span in flat.spans:
            start, stop = max(low, span.at), min(high, span.at + span.numel)
            if start < stop and span.name not in excluded:
                first = span.in_param + start - span.at
                piece = Piece(flat.kind, span.name, dtype_key(flat.dtype, span.name), first, first + stop - start)
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

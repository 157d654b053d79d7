"""A flat space: which parameters lie where in a 1-D buffer that ranks cut into equal slices.

The part of a bucket that is arithmetic over tensors: `zero.bucket` adds memory that comes and goes. Gradients, masters and
states of a bucket lie in buffers of the same space, so whoever has one asks the space for its views.

    flat   |-- p0 ------|-- p1 --|-- p2 -----------|pad|        [world_size * S]
    rank   |------ 0 ------|------ 1 ------|------ 2 --|        slices [S]

Invariant: positions never change; a parameter that leaves keeps its place, and is `gone`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deepspeed.mesh.shape import Role
from deepspeed.zero.aliases import Alias
from deepspeed.zero.layout import BucketLayout
from deepspeed.zero.param import slot_of


class FlatSpace:
    """`params[i]` has full shape `shapes[i]` and covers `layout.starts[i]` onwards; this rank owns slice `rank`."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        names: Sequence[str],
        shapes: Sequence[torch.Size],
        layout: BucketLayout,
        rank: int,
        over: Role = "shard",
    ) -> None:
        self.params = list(params)
        self.names = list(names)
        self.shapes = list(shapes)
        self.is_complex = [param.is_complex() for param in self.params]
        """Which parameters are complex: they lie here as pairs of real numbers, as optimizers of torch step them."""
        self.layout = layout
        self.gone: set[int] = set()
        """Parameters that have left the model, or moved to another bucket, since this one was made."""
        self.aliases: list[Alias] = []
        """Buffers of the model that are views of parameters here; only where the whole space is always here."""
        self.over: Role = over
        """The ranks that cut it into slices."""
        self._rank = rank

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat buffer [world_size * S], one per parameter in its full shape; of complex ones complex."""
        return [
            torch.view_as_complex(piece) if is_complex and not flat.is_complex() else piece
            for piece, is_complex in zip(self.split_numbers(flat), self.is_complex, strict=True)
        ]

    def split_numbers(self, flat: Tensor) -> list[Tensor]:
        """The same, complex ones as [..., 2] real numbers."""
        layout = self.layout
        return [
            flat.narrow(0, layout.starts[i], layout.numels[i]).view(self.shape_of_numbers(i, flat.is_complex()))
            for i in range(len(self.shapes))
        ]

    def shape_of_numbers(self, index: int, are_complex: bool = False) -> torch.Size:
        """A parameter's full shape as it lies in a buffer of real (or complex) numbers."""
        shape = self.shapes[index]
        return torch.Size((*shape, 2)) if self.is_complex[index] and not are_complex else shape

    def own_slice(self, flat: Tensor) -> Tensor:
        """This rank's slice [S] of a flat buffer [world_size * S]."""
        return flat.narrow(0, self._rank * self.layout.shard_numel, self.layout.shard_numel)

    @property
    def requires_grad(self) -> bool:
        """Whether any of the parameters wants a gradient now: scripts freeze and unfreeze between steps."""
        return any(param.requires_grad for param in self.params)

    def rename(self, names: Mapping[nn.Parameter, str]) -> None:
        """Know the parameters by the names that the model has for them now; those that it has none for are gone."""
        for param in self.params:
            slot = slot_of(param)
            assert slot is not None, "a parameter of this bucket"
            if param in names:
                self.names[slot.index] = names[param]
                self.gone.discard(slot.index)
            else:
                self.gone.add(slot.index)

    def keep(self, params: Sequence[nn.Parameter]) -> None:
        """The others have moved to another bucket."""
        self.params = list(params)
        self.gone = set(range(len(self.names))) - {slot.index for param in params if (slot := slot_of(param))}

    def name_of(self, param: nn.Parameter) -> str:
        """The name that the model has for a parameter."""
        slot = slot_of(param)
        assert slot is not None, "a parameter of this bucket"
        return self.names[slot.index]

    def members(self) -> list[tuple[int, nn.Parameter]]:
        """(index in the layout, parameter) of those that are still here and in the model."""
        slots = [(slot_of(param), param) for param in self.params]
        return [(slot.index, param) for slot, param in slots if slot and slot.index not in self.gone]

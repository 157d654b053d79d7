"""Files of ranks, as `save_mp_checkpoint_path` writes them: a rank's own part, or what the parts of all ranks are together.

Opened by `found`, used by `load`. Ours are cut as the model will be, and a rank reads its own. The original cuts by other rules (heads, grains, the
head of the model by its inputs) and keeps whole tensors among the parts: a parameter whose own part is another is read from
those of all ranks, side by side along the dim in which they add up to the whole.

Invariant: parts in several ranges (fused queries, keys and values) are never joined: side by side they are in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Box
from deepspeed.inference.weights import Held, Weights, cut


class Parts:
    """What all ranks have, and each rank's own; those of other ranks are opened when they are asked for."""

    def __init__(self, whole: Weights, open_parts: Sequence[Callable[[], Weights]], rank: int, what: str) -> None:
        self.whole, self.what, self.rank = whole, what, rank
        self._open = open_parts
        self._opened: dict[int, Weights] = {}
        self.parts = self._of(rank)

    def _of(self, rank: int) -> Weights:
        if rank not in self._opened:
            self._opened[rank] = self._open[rank]()
        return self._opened[rank]

    def source(self, name: str, whole: Sequence[int], box: Box | None) -> tuple[Weights, bool]:
        """From what the part of a parameter that a box says is read, and whether it is stored as that part."""
        if name not in self.parts.held:
            return self.whole, False
        own = self.parts.held[name].shape
        if own == tuple(whole):
            return self.parts, False
        ranges = [] if box is None else [of_dim for of_dim in box.ranges if len(of_dim) > 1]
        if box is None or ranges:
            return self.parts, box is not None
        joined = self._joined(name, whole)
        if joined is None or joined.box(self.rank) == box:
            return self.parts, True
        return joined, False

    def _joined(self, name: str, whole: Sequence[int]) -> Joined | None:
        all_ranks = [self._of(rank) for rank in range(len(self._open))]
        shapes = [weights.held[name].shape for weights in all_ranks if name in weights.held]
        if len(shapes) != len(all_ranks) or any(len(shape) != len(whole) for shape in shapes):
            return None
        dims = [d for d in range(len(whole)) if sum(shape[d] for shape in shapes) == whole[d]]
        for dim in dims:
            if all(shape[:dim] + shape[dim + 1 :] == (*whole[:dim], *whole[dim + 1 :]) for shape in shapes):
                return Joined(all_ranks, name, tuple(whole), dim)
        return None


class Joined:
    """One tensor whose parts lie side by side; answers `Weights` for its name."""

    def __init__(self, ranks: Sequence[Weights], name: str, whole: tuple[int, ...], dim: int) -> None:
        self.what, self._ranks, self._dim, self._whole = ranks[0].what, ranks, dim, whole
        self.held = {name: Held(whole, ranks[0].held[name].dtype)}
        self._sizes = [weights.held[name].shape[dim] for weights in ranks]

    def box(self, rank: int) -> Box:
        """What a rank's part is of the whole."""
        start = sum(self._sizes[:rank])
        own = ((start, start + self._sizes[rank]),)
        return Box(tuple(own if dim == self._dim else ((0, size),) for dim, size in enumerate(self._whole)))

    def read(self, name: str, box: Box | None, dtype: torch.dtype | None = None) -> Tensor:
        """See `Weights`. The tensor is whole for that moment."""
        parts = [weights.read(name, None, dtype) for weights in self._ranks]
        return cut(torch.cat(parts, self._dim), box)

    def pieces(self, name: str, box: Box | None, numel: int) -> Iterator[Tensor]:
        """See `Weights`."""
        yield self.read(name, box).view(-1)

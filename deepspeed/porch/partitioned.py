"""A tensor cut evenly over the ranks of a group, as pipelines of the original send activations.

Built by scripts. The flattened tensor is cut into world_size pieces of one length, the last one filled up with zeros;
`to_meta` is what another rank needs to know to put the pieces together again.

Invariant: `from_meta(p.to_meta(), p.data(), group).full()` has the values and the shape of the tensor.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class PartitionedTensor:
    """This rank's piece of `tensor` and what is needed to have all of it. `full` is collective in `group`."""

    def __init__(self, tensor: Tensor, group: dist.ProcessGroup, partition_meta: Tensor | None = None) -> None:
        self.group = group
        self.num_parts = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.orig_size = list(tensor.size())
        self.orig_device = tensor.device
        flat = tensor.detach().flatten()
        piece = -(-flat.numel() // self.num_parts)
        self.local_data = torch.zeros(piece, dtype=tensor.dtype, device=tensor.device)
        mine = flat[self.rank * piece : (self.rank + 1) * piece]
        self.local_data[: mine.numel()].copy_(mine)

    @classmethod
    def from_meta(
        cls, meta: Tensor, local_part: Tensor, group: dist.ProcessGroup, device: torch.device | str | None = None
    ) -> PartitionedTensor:
        """The same tensor from what `to_meta` said and this rank's piece."""
        numbers = [int(value) for value in meta.tolist()]
        made = cls.__new__(cls)
        made.group = group
        made.orig_size = numbers[1 : 1 + numbers[0]]
        made.num_parts, made.rank = numbers[1 + numbers[0] : 3 + numbers[0]]
        made.rank = dist.get_rank(group)
        made.orig_device = torch.device(device) if device is not None else local_part.device
        made.local_data = local_part.detach()
        return made

    def full(self, device: torch.device | str | None = None) -> Tensor:
        """The whole tensor, in its shape; a copy. Collective."""
        pieces = [torch.empty_like(self.local_data) for _ in range(self.num_parts)]
        dist.all_gather(pieces, self.local_data.contiguous(), group=self.group)
        numel = torch.Size(self.orig_size).numel()
        return torch.cat(pieces)[:numel].view(self.orig_size).to(device or self.orig_device)

    def to_meta(self) -> Tensor:
        """[number of dims, the shape, number of pieces, this piece's rank] as int64."""
        numbers = [len(self.orig_size), *self.orig_size, self.num_parts, self.rank]
        return torch.tensor(numbers, dtype=torch.long, device=self.orig_device)

    def data(self) -> Tensor:
        """This rank's piece, 1-D."""
        return self.local_data

    def local_size(self) -> torch.Size:
        """The piece's shape."""
        return self.local_data.size()

    def full_size(self) -> list[int]:
        """The whole tensor's shape."""
        return self.orig_size

"""Counting what leaves a node: every message that a rank hands to gloo, or shows the others in memory, by the rank that it is for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.direct import DirectExchange
from deepspeed.comm.shared import SharedExchange


@contextlib.contextmanager
def counted_between_nodes(ranks_per_node: int) -> Iterator[list[int]]:
    """Bytes of the messages that this rank sends to ranks of other nodes while within, which have consecutive ranks each."""
    nbytes: list[int] = []
    launch, posted, to_all = DirectExchange._launch, SharedExchange._posted, dist.all_to_all_single

    def is_far(group: Any, peer: int) -> bool:
        return dist.get_global_rank(group, peer) // ranks_per_node != dist.get_rank() // ranks_per_node

    def launching(self: DirectExchange, to_rank: Sequence[Tensor], from_rank: Sequence[Tensor]) -> Any:
        nbytes.extend(to_rank[peer].nbytes for peer in self._peers if is_far(self.group, peer))
        return launch(self, to_rank, from_rank)

    def posting(self: SharedExchange, own: Tensor) -> Any:
        nbytes.extend(own.nbytes for peer in range(self.world_size) if is_far(self.group, peer))
        return posted(self, own)

    def sending(
        received: Tensor, sent: Tensor, out: Any = None, into: Any = None, group: Any = None, **kwargs: Any
    ) -> Any:
        group = group or dist.group.WORLD
        numels = into or [sent.numel() // group.size()] * group.size()
        nbytes.extend(numels[peer] * sent.itemsize for peer in range(group.size()) if is_far(group, peer))
        return to_all(received, sent, out, into, group=group, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectExchange, "_launch", launching)
        patch.setattr(SharedExchange, "_posted", posting)
        patch.setattr(dist, "all_to_all_single", sending)
        yield nbytes

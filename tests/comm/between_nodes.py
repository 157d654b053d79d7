"""Counting what leaves a node: every message that a rank hands to gloo, or shows the others in memory, by the rank that it is for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
    launch, to_all = DirectExchange._launch, dist.all_to_all_single

    def is_far(group: Any, peer: int) -> bool:
        return dist.get_global_rank(group, peer) // ranks_per_node != dist.get_rank() // ranks_per_node

    def launching(self: DirectExchange, to_rank: Sequence[Tensor], from_rank: Sequence[Tensor]) -> Any:
        nbytes.extend(to_rank[peer].nbytes for peer in self._peers if is_far(self.group, peer))
        return launch(self, to_rank, from_rank)

    def posting(verb: str, num_slices: Callable[[SharedExchange], int]) -> Callable[..., Any]:
        start = getattr(SharedExchange, verb)

        def started(self: SharedExchange, full: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._is_direct(full):
                far = [peer for peer in range(self.world_size) if is_far(self.group, peer)]
                nbytes.extend(full.nbytes // num_slices(self) for _ in far)
            return start(self, full, *args, **kwargs)

        return started

    def sending(
        received: Tensor, sent: Tensor, out: Any = None, into: Any = None, group: Any = None, **kwargs: Any
    ) -> Any:
        group = group or dist.group.WORLD
        numels = into or [sent.numel() // group.size()] * group.size()
        nbytes.extend(numels[peer] * sent.itemsize for peer in range(group.size()) if is_far(group, peer))
        return to_all(received, sent, out, into, group=group, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectExchange, "_launch", launching)
        patch.setattr(SharedExchange, "start_all_gather", posting("start_all_gather", lambda own: own.world_size))
        for verb in ("start_reduce_scatter", "start_all_reduce"):
            patch.setattr(SharedExchange, verb, posting(verb, lambda own: 1))
        patch.setattr(dist, "all_to_all_single", sending)
        yield nbytes

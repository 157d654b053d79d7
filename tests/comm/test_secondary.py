"""Gathers with a copy near by: what they deliver, and whom they ask."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspeed.comm.exchange import Pending
from deepspeed.comm.secondary import SecondaryExchange


class Everyone:
    """Stands for `world_size` ranks: fills a buffer with `values`, as a gather of all their slices would."""

    group = None
    needs_shard = True

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.values = torch.arange(16.0)
        self.given: list[Tensor | None] = []

    def invalidate(self) -> None:
        """Nothing is kept."""

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        self.given.append(shard)
        values = self.values.clone()

        def finish() -> None:
            full.copy_(values)

        return Pending(finish)


def made() -> tuple[SecondaryExchange, Everyone, Everyone]:
    all_ranks, near = Everyone(rank=5, world_size=8), Everyone(rank=1, world_size=4)
    return SecondaryExchange(all_ranks, near), all_ranks, near  # type: ignore[arg-type]


def test_only_the_first_gather_after_an_update_asks_all_ranks() -> None:
    exchange, all_ranks, near = made()
    full = torch.zeros(16)
    assert exchange.needs_shard
    exchange.start_all_gather(full, torch.ones(2)).wait()
    assert not exchange.needs_shard
    full.zero_()
    exchange.start_all_gather(full).wait()
    assert torch.equal(full, all_ranks.values)
    assert (len(all_ranks.given), len(near.given)) == (1, 1)
    exchange.invalidate()
    assert exchange.needs_shard
    exchange.start_all_gather(full).wait()
    assert (len(all_ranks.given), len(near.given)) == (2, 1)


def test_near_ranks_are_given_the_slice_that_is_this_ranks_among_them() -> None:
    exchange, _, near = made()
    full = torch.zeros(16)
    exchange.start_all_gather(full).wait()
    exchange.start_all_gather(full).wait()
    assert near.given[0] is not None
    assert near.given[0].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert exchange.nbytes == 16


def test_a_copy_follows_what_was_gathered_after_it_was_stale() -> None:
    exchange, all_ranks, near = made()
    full = torch.zeros(16)
    exchange.start_all_gather(full).wait()
    all_ranks.values += 100
    exchange.invalidate()
    exchange.start_all_gather(full).wait()
    exchange.start_all_gather(full).wait()
    assert near.given[0] is not None
    assert near.given[0].tolist() == [104.0, 105.0, 106.0, 107.0]

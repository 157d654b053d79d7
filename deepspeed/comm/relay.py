"""All-gathers in two hops, so that each slice crosses the slow link between nodes once for a node, not once for each rank.

Made by `zero.build` for quantised gathers where nodes are known; `zero.gather_exchanges` puts it under a `QuantizedGather`. Ranks are
far x near, those of a node consecutive, as in `comm.quantized_exchanges`.

    far      rank l of a node has its slice gathered with those of the ranks with number l on all nodes
    near     the ranks of a node gather what each of them has now: every slice of every node

Note [Starting the near hop]
    It can start when the far one has ended, which only a wait is sure of. Before a wait blocks for its own near hop, it starts
    those of all gathers that were started earlier. So near hops start in the order of the gathers on every rank, whatever the
    timing, and the rank that waits for the earliest gets what it needs, in whatever order ranks wait. Prefetching hides the
    far hop, which is the slow one.

Invariant: the bytes of the one-hop gather, whatever they mean. Both hops have groups of their own, since each group has one
order of messages and reductions send their hops in another.

After ZeRO++ (arXiv:2306.10209), whose weights cross in one hop; the hops are those of its gradients (section 4.3), backwards.
"""

from __future__ import annotations

from collections import deque
from typing import final

from torch import Tensor

from deepspeed.comm.exchange import Exchange, OwnGathers, Pending


@final
class Relay:
    """The two hops' exchanges, and the gathers whose near hop is to start, in order: one for all that use these groups."""

    def __init__(self, near: Exchange, far: Exchange) -> None:
        self.near, self.far = near, far
        self._waiting: deque[_Gathering] = deque()

    def start(self, full: Tensor, shard: Tensor) -> Pending:
        """Fill `full` [far * near * S] with every rank's `shard` [S]. Collective over all ranks of both hops."""
        gathering = _Gathering(self, full, shard)
        self._waiting.append(gathering)

        def finish() -> None:
            while gathering in self._waiting:
                self._waiting.popleft().start_near()
            gathering.finish()

        return Pending(finish)


class _Gathering:
    """One gather on its way."""

    def __init__(self, relay: Relay, full: Tensor, shard: Tensor) -> None:
        self._relay, self._full = relay, full
        self._of_place = full.new_empty(relay.far.world_size * shard.numel())
        self._of_node: Tensor | None = None
        self._hop = relay.far.start_all_gather(self._of_place, shard)

    def start_near(self) -> None:
        """Wait for the far hop, and send on what came."""
        self._hop.wait()
        self._of_node = self._full.new_empty(self._full.numel())
        self._hop = self._relay.near.start_all_gather(self._of_node, self._of_place)

    def finish(self) -> None:
        """Wait for the near hop, and put the slices in the order of ranks."""
        assert self._of_node is not None, "the near hop has been started"
        self._hop.wait()
        num_far, num_near = self._relay.far.world_size, self._relay.near.world_size
        by_place = self._of_node.view(num_near, num_far, -1)
        self._full.view(num_far, num_near, -1).copy_(by_place.transpose(0, 1))


@final
class RelayedExchange(OwnGathers):
    """Another exchange, whose all-gathers go by `relay`. near x far ranks are all of `inner`'s."""

    def __init__(self, inner: Exchange, relay: Relay) -> None:
        assert relay.near.world_size * relay.far.world_size == inner.world_size, "near x far ranks are all ranks"
        super().__init__(inner)
        self._relay = relay

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        if shard is None:
            numel = full.numel() // self.world_size
            shard = full.narrow(0, self.rank * numel, numel)
        return self._relay.start(full, shard)

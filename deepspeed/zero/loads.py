"""How a bucket's full buffer is filled: this rank's slice is brought there, then all ranks' are gathered.

Each sharded bucket has a `Filling`, which `zero.bucket` starts and waits for; all buckets of an engine share a `LoadQueue`.

Note [Loads keep the order of launches]
    An all-gather needs every rank's slice, and a slice on the nvme tier has to be read first. Reads end when they end,
    but gathers must be started in the same order on every rank. So a buffer whose slice is being loaded queues up, and
    gathers are started from the queue's head; whoever needs one starts those before it.

Invariant: what is started is gathered, also after a read that failed: the slice is nan then, and the failure is told later.
"""

from __future__ import annotations

from collections import deque
from typing import final

import torch
from torch import Tensor

from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.tiers import Rest, Transfer
from deepspeed.utils.errors import TierError


@final
class LoadQueue:
    """Fillings whose slices are being loaded, in launch order; see Note [Loads keep the order of launches]."""

    def __init__(self) -> None:
        self.fillings: deque[Filling] = deque()
        self.failure: TierError | None = None
        """The first load that failed here. Its gather goes on, with NaN, so that no rank waits for this one."""

    def add(self, filling: Filling) -> None:
        """Queue one up; its gather starts at once where nothing has to be waited for."""
        self.fillings.append(filling)
        while self.fillings and self.fillings[0].is_loaded:
            self._start_first()

    def settle(self, until: Filling | None = None) -> None:
        """Start the gathers of all in the queue, or of those up to `until`, waiting for their loads."""
        while self.fillings and (until is None or until in self.fillings):
            self._start_first()

    def raise_failure(self) -> None:
        """Raise the load that failed, if one did."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def _start_first(self) -> None:
        try:
            self.fillings.popleft().gather()
        except TierError as error:
            self.failure = self.failure or error


@final
class Filling:
    """Fills a buffer [world_size * S] from `rest` [S] on each rank."""

    def __init__(self, rest: Rest, queue: LoadQueue, by: Exchange) -> None:
        self._rest, self._queue = rest, queue
        self.by = by
        """By what the buffer was filled last."""
        self.full: Tensor | None = None
        """What is being filled, until `wait`; None: there is nothing to wait for."""
        self._own: Tensor | None = None
        self._load: Transfer | None = None
        self._source: Tensor | None = None
        self._pending: Pending | None = None

    def start(self, full: Tensor, own: Tensor, exchange: Exchange) -> None:
        """Begin to fill `full`, of which `own` is this rank's slice. Collective: every rank, same order."""
        self.full, self._own, self.by = full, own, exchange
        if not exchange.needs_shard:
            self._pending = exchange.start_all_gather(full)
            return
        is_here = self._rest.device == full.device
        self._source = self._rest.view(0, own.numel()) if is_here else None
        if self._source is not None and not self._queue.fillings:  # nothing to wait for, and nobody to wait behind
            self._pending = exchange.start_all_gather(full, self._source)
            self._source = None
            return
        self._load = None if self._source is not None else self._rest.start_load(0, own)
        self._queue.add(self)

    @property
    def is_loaded(self) -> bool:
        """Whether this rank's slice is there, so that its gather may start without waiting."""
        return self._load is None or self._load.is_done

    def gather(self) -> None:
        """Wait for this rank's slice and start the all-gather. Raises TierError, having started it all the same."""
        assert self.full is not None, "queued by `start`"
        assert self._own is not None, "set with it"
        load, self._load = self._load, None
        source, self._source = self._source, None
        try:
            if load is not None:
                load.wait()
        except TierError:
            self._own.fill_(torch.nan)
            raise
        finally:
            self._pending = self.by.start_all_gather(self.full, source)

    def wait(self) -> None:
        """Have the buffer filled, if it was started."""
        self._queue.settle(until=self)
        if self._pending is not None:
            self._pending.wait()
        self.full = self._own = self._pending = None

"""Slices that have to be brought to a bucket's full buffer before all ranks' are gathered: from a disk, from beside a device.

`zero.bucket` starts a gather itself where its slice is in memory; else it asks the `LoadQueue` that all buckets of an engine share
for a `Filling`, and waits for that as for any gather.

Note [Loads keep the order of launches]
    An all-gather needs every rank's slice, and a slice on the nvme tier has to be read first. Reads end when they end,
    but gathers must be started in the same order on every rank. So a buffer whose slice is being loaded queues up, and
    gathers are started from the queue's head; whoever needs one starts those before it.

Note [Memory that is read into]
    A model that only runs reads all of its weights for every token. Into memory that was just mapped a disk reads slower by a
    third, because the system clears each page and finds it for the device: 1.8 GB/s where 2.7 come into memory that was
    read into before (virtio disk, Zen 4, Linux 6.18, 2026-11). So in inference the memory that a bucket leaves is kept for the
    next of its size (`KeptMemory`), until a forward begins that records a graph. Sizes follow each other in other orders than
    memory comes free in, so some is kept that waits for its size: up to a quarter more than was ever needed at once, within
    `stage3_max_live_parameters`.

Invariant: what is started is gathered, also after a read that failed: the slice is nan then, and the failure is told later.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import final

import torch
from torch import Tensor

from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.tiers import Rest, Transfer
from deepspeed.tiers.buffers import at_page, page_storage
from deepspeed.utils.errors import TierError


@final
class LoadQueue:
    """Fillings whose slices are being loaded, in launch order; see Note [Loads keep the order of launches]."""

    def __init__(self) -> None:
        self.fillings: deque[Filling] = deque()
        self.failure: TierError | None = None
        """The first load that failed here. Its gather goes on, with NaN, so that no rank waits for this one."""
        self.memory: KeptMemory | None = None
        """In inference; see Note [Memory that is read into]."""

    def start(self, rest: Rest, full: Tensor, own: Tensor, exchange: Exchange) -> Filling:
        """Begin to fill `full` [world_size * S] from `rest` [S] on each rank; `own` is this rank's slice of it. Its gather starts
        at once where nothing has to be waited for. Collective: every rank, same order."""
        filling = Filling(self, rest, full, own, exchange)
        self.fillings.append(filling)
        while self.fillings and self.fillings[0].is_loaded:
            self._start_first()
        return filling

    def start_until(self, until: Filling | None = None) -> None:
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
    """One buffer that is being filled; to whom waits, a gather like others."""

    def __init__(self, queue: LoadQueue, rest: Rest, full: Tensor, own: Tensor, exchange: Exchange) -> None:
        self._queue, self._full, self._own, self._exchange = queue, full, own, exchange
        is_here = rest.device == full.device
        self._source = rest.view(0, own.numel()) if is_here else None
        self._load: Transfer | None = None if self._source is not None else rest.start_load(0, own)
        self._gathering: Pending | None = None

    @property
    def is_loaded(self) -> bool:
        """Whether this rank's slice is there, so that its gather may start without waiting."""
        return self._load is None or self._load.is_done

    def gather(self) -> None:
        """Wait for this rank's slice and start the all-gather. Raises TierError, having started it all the same."""
        load, self._load = self._load, None
        source, self._source = self._source, None
        try:
            if load is not None:
                load.wait()
        except TierError:
            self._own.fill_(torch.nan)
            raise
        finally:
            self._gathering = self._exchange.start_all_gather(self._full, source)

    def wait(self) -> None:
        """Have the buffer filled."""
        self._queue.start_until(self)
        assert self._gathering is not None, "started by `start_until`, or before it"
        self._gathering.wait()


@final
class KeptMemory:
    """Lends memory on the CPU to full buffers, from a page boundary on, and keeps what comes back for others of the same size.

    Invariant: what is lent and what is kept are together at most as many elements as were ever lent at once; where `max_live_numel`
    allows it, `SLACK` times as many.
    """

    SLACK = 1.25

    def __init__(self, max_live_numel: int) -> None:
        self._max_live_numel = max_live_numel
        self._lent: list[weakref.ref[Tensor]] = []
        self._kept: list[Tensor] = []
        self._most = 0

    @property
    def numel(self) -> int:
        """Elements that are lent, of tensors that still have their memory, and that are kept."""
        return self._num_lent() + sum(tensor.numel() for tensor in self._kept)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """[numel], uninitialised."""
        kept = [(tensor.numel(), tensor.dtype) for tensor in self._kept]
        if (numel, dtype) in kept:
            full = self._kept.pop(kept.index((numel, dtype)))
        else:
            full = at_page(page_storage(numel * dtype.itemsize), numel, dtype)
        self._lent.append(weakref.ref(full, self._lent.remove))
        self._most = max(self._most, self._num_lent())
        limit = max(self._most, min(int(self._most * self.SLACK), self._max_live_numel))
        while self._kept and self.numel > limit:
            del self._kept[0]
        return full

    def give_back(self, full: Tensor) -> None:
        """A tensor that nothing else views."""
        self._lent = [lent for lent in self._lent if lent() is not full]
        self._kept.append(full)

    def _num_lent(self) -> int:
        tensors = (lent() for lent in self._lent)
        return sum(full.numel() for full in tensors if full is not None and full.untyped_storage().nbytes())

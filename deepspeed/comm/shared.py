"""The exchange between ranks of one host on CPUs: small messages are read where their sender wrote them, in shared memory.

Chosen by `comm.choose` where all ranks of a group share memory; what is large goes by `comm.direct`, as does everything that
has no message of its own here. The arithmetic is the same in either case (`kernels.reference.sums`).

    started   the own slice, or the whole buffer, is copied onto the rank's board (`comm.board`) and counted
    waited    the others' are read there, added up or copied into place, and acknowledged

Invariant: the bits of `DirectExchange`. Any number may be in flight, waited for in any order or never: what is forgotten is
acknowledged all the same. Starting waits for other ranks only where 1024 are, until they have started as many.
An exchange whose board is closed goes on by `DirectExchange`: what moves bytes for the engine after its end is rare, and is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.board import Board
from deepspeed.comm.direct import DirectExchange
from deepspeed.comm.exchange import Pending, slices_of, verb

MAX_NBYTES = 1 << 18
"""The largest buffer that goes this way."""
RING_NBYTES = 1 << 18
"""The room of a board for `SharedRing`; a trial's messages find place in it, too."""


class _Posted:
    """One message of every rank: this rank's is on its board."""

    _kept: list[Tensor] | None
    """Every rank's, once they were taken off the boards."""

    def __init__(self, board: Board, message: Tensor, timeout_s: float) -> None:
        self._board, self._nbytes, self._timeout_s = board, message.nbytes, timeout_s
        self._dtype = message.dtype
        self._is_read, self._kept = True, None
        self._number = board.post(message, self)
        self._is_read = False

    def is_completed(self) -> bool:
        """Whether all have posted theirs."""
        board = self._board
        return self._is_read or all(board.has(self._number, r) for r in range(board.world_size) if r != board.rank)

    def messages(self, own: Tensor) -> list[Tensor]:
        """Every rank's, this rank's being `own`; to be read before `done`. Waits for them."""
        board = self._board
        if self._kept is not None:
            return [own if rank == board.rank else kept for rank, kept in enumerate(self._kept)]
        return [
            own
            if rank == board.rank
            else board.read(self._number, rank, self._nbytes, self._timeout_s).view(self._dtype)
            for rank in range(board.world_size)
        ]

    def sum_into(self, out: Tensor, own: Tensor, first: int, divide_by: float) -> bool:
        """See `Board.sum_into`; False, too, where elements are not fp32."""
        if self._kept is not None or not own.dtype == out.dtype == torch.float32 or not out.is_contiguous():
            return False
        return self._board.sum_into(out, own, first, self._number, divide_by, self._timeout_s)

    def keep(self) -> None:
        """See `board.Unread`."""
        self._kept = [message.clone() for message in self.messages(torch.empty(0, dtype=self._dtype))]
        self.done()

    def done(self) -> None:
        """The others' room may be used again."""
        if not self._is_read:
            self._is_read = True
            self._board.acknowledge(self._number)

    def __del__(self) -> None:
        self.done()


@final
class SharedExchange:
    """See the module's text. `board` is open on all ranks of `direct`'s group, until each closes it."""

    needs_shard = True
    is_watched = False
    """See `comm.exchange.verb`."""

    def __init__(self, direct: DirectExchange, board: Board, timeout_s: float) -> None:
        self._direct, self._board, self._timeout_s = direct, board, timeout_s
        self.group: ProcessGroup | None = direct.group
        self.rank, self.world_size = direct.rank, direct.world_size

    def invalidate(self) -> None:
        """See Exchange. Nothing is kept."""

    @verb
    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        if self._is_direct(full):
            return self._direct.start_all_gather(full, shard)
        slices = slices_of(full, self.world_size)
        own = slices[self.rank]
        if shard is not None:
            own.copy_(shard)

        posted = self._posted(own)

        def finish() -> None:
            for target, message in zip(slices, posted.messages(own), strict=True):
                if target is not message:
                    target.copy_(message)
            posted.done()

        return Pending(finish, posted)

    @verb
    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        if self._is_direct(full):
            return self._direct.start_reduce_scatter(full, out, divide_by=divide_by, accumulate=accumulate)

        posted = self._posted(full)

        def finish() -> None:
            if accumulate or not posted.sum_into(out, full, self.rank * out.numel(), divide_by):
                parts = [slices_of(message, self.world_size)[self.rank] for message in posted.messages(full)]
                self._direct.add_up(parts, out, divide_by, accumulate)
            posted.done()

        return Pending(finish, posted)

    @verb
    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        if self._is_direct(full):
            return self._direct.start_all_reduce(full, divide_by)
        posted = self._posted(full)

        def finish() -> None:
            if not posted.sum_into(full, full, 0, divide_by):
                self._direct.add_up(posted.messages(full), full, divide_by, False)
            posted.done()

        return Pending(finish, posted)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        self._direct.broadcast(full, source)

    def _is_direct(self, full: Tensor) -> bool:
        return full.nbytes > MAX_NBYTES or self._board.is_closed

    def _posted(self, own: Tensor) -> _Posted:
        return _Posted(self._board, own, self._timeout_s)

    def ring(self) -> SharedRing:
        """The board, for integers; this exchange is not used any more."""
        return SharedRing(self._board, self._timeout_s)


@final
class SharedRing:
    """See `comm.exchange.Ring`: every rank reads all others' integers where they lie. On a board of its own, since agreements and
    buffers are not started in one order."""

    def __init__(self, board: Board, timeout_s: float) -> None:
        self._board, self._timeout_s = board, timeout_s
        self.num_calls = 0

    def start_gather(self, words: Sequence[int]) -> Callable[[], list[tuple[int, ...]]]:
        """See Ring."""
        return self._start(words)

    def start_largest(self, words: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """See Ring."""
        gathered = self._start(words)
        return lambda: tuple(map(max, zip(*gathered(), strict=True)))

    def _start(self, words: Sequence[int]) -> Callable[[], list[tuple[int, ...]]]:
        self.num_calls += 1
        own = torch.tensor(words, dtype=torch.int64)
        posted = _Posted(self._board, own, self._timeout_s)

        def finish() -> list[tuple[int, ...]]:
            found = [tuple(message.tolist()) for message in posted.messages(own)]
            posted.done()
            return found

        return finish

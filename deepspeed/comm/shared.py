"""The exchange between ranks of one host on CPUs: small messages are read where their sender wrote them, in shared memory.

Chosen by `comm.choose` where all ranks of a group share memory; what is large goes by `comm.direct`, as does everything that
has no message of its own here. The arithmetic is the same in either case (`kernels.reference.sums`); what waits and copies is
compiled (`comm.counters`).

    started   the own slice, or the whole buffer, is copied onto the rank's board and counted
    waited    the others' are read there, added up or copied into place, and acknowledged

Each rank has a board (`Board`), memory that it alone writes messages on, and that the others read where they lie:

    a board   | counter: messages posted | closed | acks [N messages][ranks] | where they lie [N messages] | messages ... |

A message stays until every other rank has acknowledged it; who waits for it looks at the counter, then sleeps on it. Posting
never waits for room: a message that finds none lies in memory of its own until then. Memory has no name (memfd): the others open
it once, by process and number, and the kernel takes it back when the last of them has ended, however it ended. It does not count
against /dev/shm. Each rank closes its own when what it was made for ends, whenever that is there: nobody waits, and who waits for
it is told.

Invariants: the bits of `DirectExchange`. Every rank posts messages of the same sizes in the same order, so a message's number
says which it is. Any number may be in flight, waited for in any order or never: what is forgotten is acknowledged all the same.
Starting waits for other ranks only where 1024 are, until they have started as many. An exchange whose board is closed goes on by
`DirectExchange`: what moves bytes for the engine after its end is rare, and is the same on all ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.counters import words
from deepspeed.comm.direct import DirectExchange
from deepspeed.comm.exchange import Pending, slices_of, verb
from deepspeed.comm.watchdog import LOOKING_ROUND
from deepspeed.kernels.native_sums import add_up_at
from deepspeed.utils.errors import RankMismatchError, TrainingStateError

MAX_NBYTES = 1 << 18
"""The largest buffer that goes this way."""
RING_NBYTES = 1 << 18
"""The room of a board for `SharedRing`; a trial's messages find place in it, too."""
NOTHING = torch.empty(0, dtype=torch.uint8)
NUM_MESSAGES = 1024
"""How many can be on a board at once."""
ROOM_NBYTES = 2 << 20
"""What a board has for them; beyond that they lie beside it."""
MAX_BOARDS = 16
"""How many of that size a process has at once: with as many others' as groups have ranks, 32 MiB of its own."""
LINE = 64
"""Bytes of a line of the cache: what two ranks write is not in the same."""
SPIN_US = 50
"""How long a rank looks at a counter before it sleeps, where each rank has a processor of its own."""
LOOK_MS = 100
"""How often a rank that sleeps looks whether the others still run."""

LINGER_S = 5.0
"""How long a rank that lets go of its board waits for readers of what lies beside it."""


class Address(NamedTuple):
    """Where the others find a board."""

    pid: int
    fd: int


class _Message(NamedTuple):
    """One on the own board: its number, the room that it has, and its memory where that is beside the board."""

    number: int
    start: int
    nbytes: int
    fd: int | None


class _Posted:
    """One message of every rank: this rank's is on its board, once that has posted it."""

    _kept: list[Tensor] | None
    """Every rank's, once they were taken off the boards."""

    def __init__(self, board: Board, message: Tensor, timeout_s: float) -> None:
        self._board, self._timeout_s = board, timeout_s
        self._dtype, self._nbytes = message.dtype, message.nbytes
        self.number, self._kept = -1, None
        """By which it is found, on every board; -1 before it is posted, and when it is done with."""

    def is_completed(self) -> bool:
        """Whether all have posted theirs."""
        board = self._board
        return self.number < 0 or all(board.has(self.number, r) for r in range(board.world_size) if r != board.rank)

    def messages(self, own: Tensor) -> list[Tensor]:
        """Every rank's, this rank's being `own`; to be read before `done`. Waits for them."""
        board = self._board
        found = []
        for rank in range(board.world_size):
            if rank == board.rank:
                found.append(own)
            elif self._kept is not None:
                found.append(self._kept[rank])
            else:
                found.append(board.read(self.number, rank, self._nbytes, self._timeout_s).view(self._dtype))
        return found

    def sum_into(self, out: Tensor, own: Tensor, first: int, divide_by: float) -> bool:
        """See `Board.sum_into`; False, too, where elements are not fp32."""
        if self._kept is not None or not own.dtype == out.dtype == torch.float32 or not out.is_contiguous():
            return False
        return self._board.sum_into(out, own, first, self.number, divide_by, self._timeout_s)

    def keep(self) -> None:
        """Take all of them off the boards, and acknowledge; waits for them."""
        self._kept = [message.clone() for message in self.messages(torch.empty(0, dtype=self._dtype))]
        self.done()

    def done(self) -> None:
        """The others' room may be used again."""
        number, self.number = self.number, -1
        if number >= 0:
            self._board.acknowledge(number)

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
        posted = self._board.post(_Posted(self._board, own, self._timeout_s), own)

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
        posted = self._board.post(_Posted(self._board, full, self._timeout_s), full)

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
        posted = self._board.post(_Posted(self._board, full, self._timeout_s), full)

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

    def _start_gather(self, words: Sequence[int]) -> Callable[[], list[tuple[int, ...]]]:
        self.num_calls += 1
        own = torch.tensor(words, dtype=torch.int64)
        posted = self._board.post(_Posted(self._board, own, self._timeout_s), own)

        def finish() -> list[tuple[int, ...]]:
            found = [tuple(message.tolist()) for message in posted.messages(own)]
            posted.done()
            return found

        return finish

    start_gather = _start_gather
    """See Ring."""

    def start_largest(self, words: Sequence[int]) -> Callable[[], tuple[int, ...]]:
        """See Ring."""
        gathered = self._start_gather(words)
        return lambda: tuple(map(max, zip(*gathered(), strict=True)))


@final
class Board:
    """The boards of all ranks of a group on one host, of which one is this rank's.

    Made in three steps, since the ranks tell each other addresses in between: the constructor, `open`, `seal`. The constructor
    raises OSError where there is no memory, or `MAX_BOARDS` are open; `num_busy` is how many ranks may run on this host, and
    `room_nbytes` is for messages, `ROOM_NBYTES` by default.
    """

    num_open: ClassVar[float] = 0
    """Boards that this process has; one with less room is a part of one."""

    def __init__(self, rank: int, world_size: int, num_busy: int, room_nbytes: int | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self._sides: list[_Side] = []
        self._live: deque[_Message] = deque()
        self._unread: dict[int, weakref.ref[_Posted]] = {}
        """Numbers that this rank has posted and not acknowledged."""
        self.is_closed = False
        self._watched: dict[int, int] = {}
        """Other ranks' processes: by number, something that can be read once they have ended."""
        self._fd: int | None = None
        self._words, self._pid = words(), os.getpid()
        self._acks_at = 2 * LINE
        self._places_at = self._acks_at + 4 * NUM_MESSAGES * world_size
        self._room_at = -(-(self._places_at + 16 * NUM_MESSAGES) // LINE) * LINE
        self._num_posted, self._head = 0, 0
        self._room_nbytes = ROOM_NBYTES if room_nbytes is None else room_nbytes
        self._share = self._room_nbytes / ROOM_NBYTES
        self._spin_us = SPIN_US if len(os.sched_getaffinity(0)) >= num_busy else 0
        if Board.num_open >= MAX_BOARDS:
            gc.collect()  # an engine that was dropped, and not destroyed, has its boards until then
        if Board.num_open >= MAX_BOARDS:
            raise OSError(
                errno.ENOMEM, f"this process has boards of {MAX_BOARDS} groups already, {ROOM_NBYTES >> 20} MiB each"
            )
        self._fd = _memory(self._room_at + self._room_nbytes)
        Board.num_open += self._share

    @property
    def address(self) -> Address:
        """Where the others find this rank's."""
        assert self._fd is not None, "before the board is sealed"
        return Address(self._pid, self._fd)

    def open(self, addresses: Sequence[Address]) -> None:
        """Have all boards, in rank order. Raises OSError."""
        nbytes = self._room_at + self._room_nbytes
        for rank, address in enumerate(addresses):
            self._sides.append(_Side(_mapped(address, nbytes), self._places_at, self._room_at, address.pid))
            if rank != self.rank:
                self._watched[rank] = os.pidfd_open(address.pid)

    def seal(self) -> None:
        """Every rank has opened this one: its number is given back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def close(self) -> None:
        """Give the memory back, on this rank alone. The others read what it has posted, and are told where they wait for more; what it
        has not read it will never read. Twice is once."""
        if self.is_closed or (self._fd is None and not self._sides):  # it has found no memory
            return
        if os.getpid() != self._pid:  # a forked child, such as a data loader's worker: the board is its parent's
            return
        type(self).num_open -= self._share
        self.seal()
        for number in list(self._unread):
            self.acknowledge(number)
        end = time.monotonic() + LINGER_S
        while self._is_awaited() and time.monotonic() < end:
            time.sleep(1e-3)  # what lies beside the board goes with this process
            self._forget()
        self.is_closed = True
        for fd in (*self._watched.values(), *(message.fd for message in self._live if message.fd is not None)):
            os.close(fd)
        if self._sides:
            self._words.ds_shared_store(self._sides[self.rank].base + LINE, 1)
        for side in self._sides:
            side.close()
        self._watched.clear()
        self._live.clear()

    def _is_awaited(self) -> bool:
        """Whether something lies beside this board, and a rank that may read it still runs."""
        beside = any(message.fd is not None for message in self._live)
        return beside and any(not self._has_ended(rank) for rank in self._watched)

    def __del__(self) -> None:
        if self.__dict__.get("_pid") is not None:
            self.close()

    def post(self, posted: _Posted, message: Tensor) -> _Posted:
        """Copy a flat tensor onto the board, and give it its number, which is acknowledged when it is done. What is `NUM_MESSAGES`
        older is taken off the boards (`keep`), on every rank, so that there is a place for this one; the slowest rank is waited for."""
        self._require_open()
        number, own = self._num_posted, self._sides[self.rank]
        self._forget()
        if self._unread and next(iter(self._unread)) <= number - NUM_MESSAGES:
            for old in [old for old in self._unread if old < number - NUM_MESSAGES // 2]:
                waiting = self._unread[old]()
                if waiting is not None:
                    waiting.keep()
        if len(self._live) == NUM_MESSAGES:
            self._wait_for_acks(posted._timeout_s)
        message = message.contiguous()
        nbytes = message.nbytes
        start = self._place(nbytes)
        if start is not None:
            target, place = own.room_at + start, start
            self._live.append(_Message(number, start, nbytes, None))
        else:
            fd = _memory(nbytes)
            beside = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
            target, place = beside.data_ptr(), -1 - fd
            self._live.append(_Message(number, 0, 0, fd))
        own.places[number % NUM_MESSAGES] = place
        self._num_posted += 1
        self._unread[number] = weakref.ref(posted)
        self._words.ds_shared_put(own.base, self._num_posted & 0xFFFFFFFF, target, message.data_ptr(), nbytes)
        posted.number = number
        return posted

    def has(self, number: int, rank: int) -> bool:
        """Whether a rank's message is there, or nobody can wait for it any more."""
        return self.is_closed or bool(
            self._words.ds_shared_have_reached(self._sides[rank].base, 1, -1, (number + 1) & 0xFFFFFFFF)
        )

    def read(self, number: int, rank: int, nbytes: int, timeout_s: float) -> Tensor:
        """Another rank's message [nbytes] of uint8, where it lies, until `acknowledge`. Waits for it.

        Raises RankMismatchError where that rank has ended, or after `timeout_s`; TrainingStateError where this board is closed.
        """
        if self.is_closed:
            self._require_open()
        side = self._sides[rank]
        if not self._words.ds_shared_wait(side.base, (number + 1) & 0xFFFFFFFF, self._spin_us, LOOK_MS):
            self._wait_long(number, rank, timeout_s)
        place = side.places[number % NUM_MESSAGES]
        if place >= 0:
            # No tensor is kept, so that a board is no storage of an engine's.
            at = side.room_offset + place
            return torch.frombuffer(side.memory, dtype=torch.uint8, offset=at, count=nbytes) if nbytes else NOTHING
        try:
            beside = _mapped(Address(side.pid, -1 - place), nbytes)
        except OSError:
            self._check(rank, 0.0, timeout_s)
            raise
        return torch.frombuffer(beside, dtype=torch.uint8)

    def sum_into(self, out: Tensor, own: Tensor, first: int, number: int, divide_by: float, timeout_s: float) -> bool:
        """`out` [n] = the sum of every rank's elements [first, first + n) of a message, in rank order, / divide_by; this rank's is
        `own`. fp32, without gaps. False, with nothing done, where one lies beside its board. Waits for them; see `read`."""
        self._require_open()
        at = first * own.itemsize
        addresses = []
        for rank, side in enumerate(self._sides):
            if rank == self.rank:
                addresses.append(own.data_ptr() + at)
                continue
            if not self._words.ds_shared_wait(side.base, (number + 1) & 0xFFFFFFFF, self._spin_us, LOOK_MS):
                self._wait_long(number, rank, timeout_s)
            place = side.places[number % NUM_MESSAGES]
            if place < 0:
                return False
            addresses.append(side.room_at + place + at)
        add_up_at(addresses, torch.float32, out, divide_by)
        return True

    def _wait_long(self, number: int, rank: int, timeout_s: float) -> None:
        """Have another rank's message there, which was not when this one first looked."""
        side, begun = self._sides[rank], time.monotonic()
        LOOKING_ROUND[threading.get_ident()] = f"message {number} of rank {rank} on {id(self)}"
        try:
            while not self._words.ds_shared_wait(side.base, (number + 1) & 0xFFFFFFFF, 0, LOOK_MS):
                self._check(rank, time.monotonic() - begun, timeout_s)
        finally:
            del LOOKING_ROUND[threading.get_ident()]

    def acknowledge(self, number: int) -> None:
        """This rank has read all others' messages of this number, or never will."""
        if self.is_closed or os.getpid() != self._pid:
            return
        self._unread.pop(number, None)
        at = self._acks_at + 4 * (number % NUM_MESSAGES * self.world_size + self.rank)
        for rank, side in enumerate(self._sides):
            if rank != self.rank:
                self._words.ds_shared_store(side.base + at, (number + 1) & 0xFFFFFFFF)

    def _forget(self) -> None:
        """Take back the room of the oldest messages that all have read."""
        acks = self._sides[self.rank].base + self._acks_at
        while self._live:
            number = self._live[0].number
            at = acks + 4 * (number % NUM_MESSAGES * self.world_size)
            if not self._words.ds_shared_have_reached(at, self.world_size, self.rank, (number + 1) & 0xFFFFFFFF):
                return
            message = self._live.popleft()
            if message.fd is not None:
                os.close(message.fd)

    def _wait_for_acks(self, timeout_s: float) -> None:
        """Have a place for one more message."""
        begun, number = time.monotonic(), self._live[0].number
        acks = self._sides[self.rank].base + self._acks_at + 4 * (number % NUM_MESSAGES * self.world_size)
        LOOKING_ROUND[threading.get_ident()] = f"acknowledgements of message {number} on {id(self)}"
        try:
            while len(self._live) == NUM_MESSAGES:
                time.sleep(1e-4)
                for rank in self._watched:
                    if not self._words.ds_shared_have_reached(acks + 4 * rank, 1, -1, (number + 1) & 0xFFFFFFFF):
                        self._check(rank, time.monotonic() - begun, timeout_s)
                self._forget()
        finally:
            del LOOKING_ROUND[threading.get_ident()]

    def _place(self, nbytes: int) -> int | None:
        """Where a message fits: rooms are taken in a circle and given back in the order of posting. None: nowhere."""
        oldest = None
        for message in self._live:
            if message.nbytes:  # the others lie beside the board
                oldest = message
                break
        need = -(-nbytes // LINE) * LINE
        if oldest is None:
            self._head = 0
        tail = 0 if oldest is None else oldest.start
        if self._head < tail:  # the circle has begun again
            start = self._head if self._head + need < tail else None
        elif self._head + need <= self._room_nbytes:
            start = self._head
        else:
            start = 0 if need < tail else None
        if start is not None:
            self._head = start + need
        return start

    def _check(self, rank: int, waited_s: float, timeout_s: float) -> None:
        """Raise RankMismatchError if a rank has ended, or has let go of its board, or has been waited for too long."""
        side, has_ended = self._sides[rank], self._has_ended(rank)
        if has_ended or self._words.ds_shared_have_reached(side.base + LINE, 1, -1, 1):
            what = f"its process {side.pid} has ended" if has_ended else "it has let go of the group"
            raise RankMismatchError(
                f"[rank {self.rank} of {self.world_size} that share memory] rank {rank} will send no more: {what}.\n"
                "  Its own output says why."
            )
        if waited_s > timeout_s:
            raise RankMismatchError(
                f"[rank {self.rank} of {self.world_size} that share memory] rank {rank} has not sent its part for {timeout_s:.0f} s.\n"
                "  Look at what it does (py-spy dump --pid "
                f"{side.pid}), or give init_distributed a longer timeout."
            )

    def _has_ended(self, rank: int) -> bool:
        return bool(select.select([self._watched[rank]], [], [], 0)[0])

    def _require_open(self) -> None:
        if self.is_closed:
            raise TrainingStateError(
                f"[rank {self.rank} of {self.world_size} that share memory] the engine or group of this exchange has ended.\n"
                "  Wait for what is under way before engine.destroy() or destroy_process_group()."
            )


class _Side:
    """One rank's board, as all see it."""

    def __init__(self, memory: mmap.mmap, places_at: int, room_at: int, pid: int) -> None:
        self.memory = memory
        self.pid = pid
        self.places = memoryview(memory)[places_at : places_at + 16 * NUM_MESSAGES].cast("q")
        """Where messages lie, by number modulo `NUM_MESSAGES`: an offset in the room, or -1 - the number of memory of its own."""
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        """Its address in this process."""
        self.room_offset, self.room_at = room_at, self.base + room_at
        """Where the room begins, in the memory and in this process."""

    def close(self) -> None:
        """Unmap it, on this rank."""
        self.places.release()
        with contextlib.suppress(BufferError):  # somebody looks at it still; it goes with the last who does
            self.memory.close()


def _memory(nbytes: int) -> int:
    """Memory without a name, as a file's number. Raises OSError where there is none."""
    fd = os.memfd_create("deepspeed")
    try:
        os.posix_fallocate(fd, 0, nbytes)  # now, and not as a signal at the first write
    except OSError:
        os.close(fd)
        raise
    return fd


def _mapped(address: Address, nbytes: int) -> mmap.mmap:
    fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR)
    try:
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)

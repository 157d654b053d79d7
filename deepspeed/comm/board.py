"""A board for each rank of a host: memory that it alone writes messages on, and that the others read where they lie.

Made by `comm.choose` for `comm.shared`; what waits and copies is compiled (`comm.counters`).

    a board   | counter: messages posted | closed | acks [N messages][ranks] | where they lie [N messages] | messages ... |

A message is copied onto the own board, counted, and stays until every other rank has acknowledged it; who waits for it looks
at the counter, then sleeps on it. Posting never waits for room: a message that finds none lies in memory of its own until then.
Memory has no name (memfd): the others open it once, by process and number, and the kernel takes it back when the last of them
has ended, however it ended. It does not count against /dev/shm.

Each rank closes its own when what it was made for ends, whenever that is there: nobody waits, and who waits for it is told.

Invariant: every rank posts messages of the same sizes in the same order, so a message's number says which it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import mmap
import os
import select
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor

from deepspeed.comm.counters import words
from deepspeed.kernels.native_sums import add_up_at
from deepspeed.utils.errors import RankMismatchError, TrainingStateError

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


class Unread(Protocol):
    """A message of every rank that this one has not read yet."""

    def keep(self) -> None:
        """Take all of them off the boards, and acknowledge; waits for them."""


class _Message(NamedTuple):
    """One on the own board: its number, the room that it has, and its memory where that is beside the board."""

    number: int
    start: int
    nbytes: int
    fd: int | None


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
        self._unread: dict[int, weakref.ref[Unread]] = {}
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

    def post(self, message: Tensor, reader: Unread) -> int:
        """Copy a flat tensor onto the board; its number, which `reader` acknowledges. Readers of messages that are `NUM_MESSAGES`
        older are asked to `keep` them, on every rank, so that there is a place for this one; the slowest rank is waited for."""
        self._require_open()
        number, own = self._num_posted, self._sides[self.rank]
        self._forget()
        if self._unread and next(iter(self._unread)) <= number - NUM_MESSAGES:
            for old in [old for old in self._unread if old < number - NUM_MESSAGES // 2]:
                waiting = self._unread[old]()
                if waiting is not None:
                    waiting.keep()
        if len(self._live) == NUM_MESSAGES:
            self._wait_for_acks(self._live[0].number)
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
        own.set_place(number % NUM_MESSAGES, place)
        self._num_posted += 1
        self._unread[number] = weakref.ref(reader)
        self._words.ds_shared_put(own.base, self._num_posted & 0xFFFFFFFF, target, message.data_ptr(), nbytes)
        return number

    def has(self, number: int, rank: int) -> bool:
        """Whether a rank's message is there, or nobody can wait for it any more."""
        return self.is_closed or bool(
            self._words.ds_shared_have_reached(self._sides[rank].base, 1, -1, (number + 1) & 0xFFFFFFFF)
        )

    def read(self, number: int, rank: int, nbytes: int, timeout_s: float) -> Tensor:
        """Another rank's message [nbytes] of uint8, where it lies, until `acknowledge`. Waits for it.

        Raises RankMismatchError where that rank has ended, or after `timeout_s`; TrainingStateError where this board is closed.
        """
        self._require_open()
        side = self._sides[rank]
        place = self._wait_for(number, rank, timeout_s)
        if place >= 0:
            return side.message(place, nbytes)
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
            place = self._wait_for(number, rank, timeout_s)
            if place < 0:
                return False
            addresses.append(side.room_at + place + at)
        add_up_at(addresses, torch.float32, out, divide_by)
        return True

    def _wait_for(self, number: int, rank: int, timeout_s: float) -> int:
        """Where another rank's message lies, once it is there."""
        side = self._sides[rank]
        if not self._words.ds_shared_wait(side.base, (number + 1) & 0xFFFFFFFF, self._spin_us, LOOK_MS):
            begun = time.monotonic()
            while not self._words.ds_shared_wait(side.base, (number + 1) & 0xFFFFFFFF, 0, LOOK_MS):
                self._check(rank, time.monotonic() - begun, timeout_s)
        return side.place(number % NUM_MESSAGES)

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
        while self._live and self._is_read(self._live[0].number):
            message = self._live.popleft()
            if message.fd is not None:
                os.close(message.fd)

    def _is_read(self, number: int) -> bool:
        at = self._sides[self.rank].base + self._acks_at + 4 * (number % NUM_MESSAGES * self.world_size)
        return bool(self._words.ds_shared_have_reached(at, self.world_size, self.rank, (number + 1) & 0xFFFFFFFF))

    def _wait_for_acks(self, number: int) -> None:
        while not self._is_read(number):
            time.sleep(1e-4)
            for rank in self._watched:
                self._check(rank, 0.0, 1.0)
        self._forget()

    def _place(self, nbytes: int) -> int | None:
        """Where a message fits: rooms are taken in a circle and given back in the order of posting. None: nowhere."""
        oldest = next((message for message in self._live if message.nbytes), None)
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
        self._memory = memory
        self.pid = pid
        self._places = memoryview(memory)[places_at : places_at + 16 * NUM_MESSAGES].cast("q")
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        """Its address in this process."""
        self._room_at = room_at
        self.room_at = self.base + room_at

    def close(self) -> None:
        """Unmap it, on this rank."""
        self._places.release()
        with contextlib.suppress(BufferError):  # somebody looks at it still; it goes with the last who does
            self._memory.close()

    def message(self, place: int, nbytes: int) -> Tensor:
        """[nbytes] of uint8 that lie in its room. No tensor is kept, so that a board is no storage of an engine's."""
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=self._room_at + place, count=nbytes)

    def place(self, entry: int) -> int:
        """Where a message lies: an offset, or -1 - the number of memory of its own."""
        return self._places[entry]

    def set_place(self, entry: int, place: int) -> None:
        """Of the next message."""
        self._places[entry] = place


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

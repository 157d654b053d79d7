"""What a queue that moves bytes between memory and files is asked, and what it answers.

Spoken by the store and the handle to a queue (`io_queue.py` opens one).

Invariant: a request's memory and files are borrowed until its outcome is there; whoever starts it keeps both.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from deepspeed.tiers.block_file import BlockFile

CHECKED = 65536
"""Bytes under one checksum: 8 bytes of memory for each, and the granularity of the store."""


class Means(IntEnum):
    """How the operating system is asked; the numbers are those of `csrc/aio.cpp`."""

    AUTO = 0
    """The first of these that this machine allows."""
    IO_URING = 1
    LIBAIO = 2
    """The io_submit system calls; the library of that name is not needed."""
    THREADS = 3
    """A thread per read or write in flight."""
    PYTHON = 4
    """The same, in Python."""


class Fault(IntEnum):
    """What can befall a piece; the numbers are those of `csrc/aio.cpp`."""

    NONE = 0
    EIO = 1
    ENOSPC = 2
    SHORT = 3
    """Half of it is moved, and has to be continued."""
    END = 4
    """Half of it is moved, and no more ever will be."""
    FLIP = 5
    """One bit of what was read is wrong."""
    REFUSE = 6
    """Direct I/O is refused although the file could be opened for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Move `nbytes` bytes between memory at `address` and `files`, from `offset` of their logical space on."""

    files: tuple[BlockFile, ...]
    stripe_nbytes: int = 0
    """With several files: a multiple of a page."""
    offset: int
    address: int
    nbytes: int
    is_write: bool
    checksums: Any = None
    """A numpy uint64 array, an element per CHECKED bytes: set by a write, compared by a read. Offset and nbytes are
    multiples of CHECKED then."""
    keeps: object = None
    """What owns the memory."""


class Failure(NamedTuple):
    """The first thing that went wrong with a request."""

    kind: str
    """ "os": the system's error; "short": end of file, or a disk that took no more; "corrupt": a checksum differs."""
    errno: int
    file: BlockFile
    offset: int
    """In that file."""
    expected: int
    """Bytes, or the checksum."""
    got: int


class Ticket(Protocol):
    """A request under way."""

    @property
    def is_done(self) -> bool:
        """Whether the outcome is there."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for the outcome; False when it is not there after that time."""

    @property
    def failure(self) -> Failure | None:
        """What went wrong, once done."""


class IoQueue(Protocol):
    """Carries requests out, several pieces at a time, in no promised order."""

    means: Means

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one request was under way."""

    def start(self, request: Request) -> Ticket:
        """Begin; returns at once."""

    def inject(self, fault: Fault, after: int = 0) -> None:
        """For tests: let this befall a piece, after that many others. Once."""

    def close(self) -> None:
        """Wait for what is under way, then end the threads. Again is nothing."""

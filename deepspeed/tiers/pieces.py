"""How a transfer between memory and files is cut into pieces that direct I/O accepts.

Used by the Python queue and by `direct`; `csrc/aio.cpp` cuts in the same way. Pure arithmetic.

A transfer covers the bytes [offset, offset + nbytes) of a logical space, which lies in one file, or in several file by
file in stripes of `stripe_nbytes`. Direct I/O moves whole pages, so a piece is either whole pages, at most one block
long and within one block and stripe, or the few bytes before the first or after the last page boundary. Those go through
the page cache, so no byte outside of the transfer is written and no file grows past its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

PAGE = 4096
"""Bytes. A multiple of every block size that disks have in practice, and the alignment of offsets, lengths and memory."""


class Piece(NamedTuple):
    """One read or write of one file."""

    file_index: int
    file_offset: int
    start: int
    """Its first byte, counted from the transfer's."""
    nbytes: int
    is_whole_pages: bool


def stripes(offset: int, nbytes: int, num_files: int = 1, stripe_nbytes: int = 0) -> Iterator[Piece]:
    """The pieces of a transfer that is cut at stripes alone, in order."""
    at, end = offset, offset + nbytes
    while at < end:
        stop, file_index, file_offset = end, 0, at
        if num_files > 1:
            stripe, within = divmod(at, stripe_nbytes)
            file_index, file_offset = stripe % num_files, stripe // num_files * stripe_nbytes + within
            stop = min(end, (stripe + 1) * stripe_nbytes)
        yield Piece(file_index, file_offset, at - offset, stop - at, at % PAGE == 0 == (stop - at) % PAGE)
        at = stop


def cut(offset: int, nbytes: int, block_nbytes: int, num_files: int = 1, stripe_nbytes: int = 0) -> Iterator[Piece]:
    """The pieces of a transfer, in order. Blocks and stripes are whole pages; stripes matter with several files."""
    at, end = offset, offset + nbytes
    while at < end:
        boundary = (at // PAGE + 1) * PAGE if at % PAGE else (at // block_nbytes + 1) * block_nbytes
        file_index, file_offset = 0, at
        if num_files > 1:
            stripe, within = divmod(at, stripe_nbytes)
            file_index, file_offset = stripe % num_files, stripe // num_files * stripe_nbytes + within
            boundary = min(boundary, (stripe + 1) * stripe_nbytes)
        stop = min(end, boundary)
        is_whole_pages = at % PAGE == 0 and stop - at >= PAGE
        if is_whole_pages:
            stop -= stop % PAGE
        yield Piece(file_index, file_offset, at - offset, stop - at, is_whole_pages)
        at = stop

"""Where files are mapped in memory, so that pages that were read can be handed back.

Used by `original` and by inference's `weights`: torch maps a file as a whole, and what was copied out of it would stay resident beside the
copy. Only pages that the system says are of these files are touched; a page handed back is read again when it is asked for.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)


class Mapped:
    """The places of one file, or of those in one folder, at the time this is made; none where the system does not say."""

    def __init__(self, path: Path) -> None:
        self._ranges: list[tuple[int, int]] = []
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and path in (Path(fields[5]), Path(fields[5]).parent) and fields[1] == "rw-p":
                start, _, stop = fields[0].partition("-")
                self._ranges.append((int(start, 16), int(stop, 16)))

    def let_go(self, part: Tensor) -> None:
        """Hand back the pages that a contiguous part, which nobody wrote to, lies on."""
        page = mmap.PAGESIZE
        begin, end = part.data_ptr() // page * page, -(-(part.data_ptr() + part.nbytes) // page) * page
        is_mapped = any(start <= begin and end <= stop for start, stop in self._ranges)
        if end > begin and is_mapped and _MADV_DONTNEED is not None:
            _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


_libc = ctypes.CDLL(None)

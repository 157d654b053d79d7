"""An open file: for direct I/O where the file system allows that, and through the page cache beside.

Opened by the store and the handle, used by the queues. Linux keeps the two views of one file coherent: a direct read
writes dirty pages back first, a direct write drops them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from types import TracebackType
from typing import final

_DIRECT = getattr(os, "O_DIRECT", 0)
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
"""How open(2) says that a file system (tmpfs, some network ones) has no direct I/O."""


@final
class BlockFile:
    """`fd` goes through the page cache; `direct_fd` around it, and is -1 where that is refused."""

    def __init__(self, path: Path | str, flags: int, *, mode: int = 0o666, is_direct: bool = True) -> None:
        """Open as os.open does; raises its OSError."""
        self.path = Path(path)
        self.fd = os.open(path, flags | os.O_CLOEXEC, mode)
        self.direct_fd = -1
        self._is_owner = True
        if is_direct and _DIRECT:
            try:
                self.direct_fd = os.open(path, flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | _DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    os.close(self.fd)
                    raise

    @classmethod
    def of_fd(cls, fd: int) -> BlockFile:
        """A descriptor that its owner opened and will close; it stays as direct, or not, as it is."""
        import fcntl

        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        made = cls.__new__(cls)
        made.path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        made._is_owner, made.fd, made.direct_fd = False, fd, -1
        if _DIRECT and flags & _DIRECT:
            made.direct_fd, made.fd = fd, os.open(f"/proc/self/fd/{fd}", flags & os.O_ACCMODE | os.O_CLOEXEC)
        return made

    def close(self) -> None:
        """Close what was opened here; again is nothing."""
        opened = [self.fd, self.direct_fd] if self._is_owner else [self.fd] if self.direct_fd >= 0 else []
        self.fd = self.direct_fd = -1
        for fd in opened:
            if fd >= 0:
                with contextlib.suppress(
                    OSError
                ):  # a network file system may report a late error; data were waited for
                    os.close(fd)

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

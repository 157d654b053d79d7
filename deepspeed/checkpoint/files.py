"""Files that survive a crash, and opening files that a stranger may have prepared.

Used by every module here that touches the disk; pure os calls. The recipe: write aside in the same file system, fsync
the file, rename over the old name, fsync the folder. A reader sees the old or the new, never a part.

Invariant: nothing is renamed to a public name before its bytes and those of everything it refers to are durable.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from deepspeed.utils.errors import CheckpointError

MUCH = 1 << 26
"""Bytes that are removed in a thread."""

_removing: list[threading.Thread] = []


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of calls on a descriptor, which know no path, the path: "[Errno 5] Input/output error: 'path'"."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_durably(path: Path, data: bytes) -> None:
    """Write and fsync a file that nobody looks for yet."""
    with naming(path), open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Put a file at `path` as a whole, now and after a crash."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write_durably(aside, data)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def swap(one: Path, other: Path) -> bool:
    """Exchange two folders in one step (Linux renameat2); False where the system or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(one))


def remove_tree(folder: Path) -> None:
    """Delete a folder so that a crash in between leaves no half of it under its name.

    The name is free when this returns. Giving back the space takes a file system some 0.2 s per GB; where there is much of
    it that goes on in a thread, for which the process waits at its end, and `finish_removals` before space is needed.
    """
    doomed = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.trash")
    try:
        os.rename(folder, doomed)
    except FileNotFoundError:
        return
    if sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(doomed)) < MUCH:
        shutil.rmtree(doomed, ignore_errors=True)
        return
    thread = threading.Thread(target=shutil.rmtree, args=(doomed, True), name="checkpoint-remove")
    try:
        thread.start()
    except RuntimeError:  # the interpreter is at its end
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        _removing.append(thread)


def finish_removals() -> None:
    """Wait until the space of what this process removed is free."""
    while _removing:
        _removing.pop().join()


def check_tag(tag: str) -> str:
    """A tag as a relative path below the save folder. Raises CheckpointError for one that leads out of it, and for one
    that could not be found again: `latest` loses blanks at its ends, and hidden folders are saves on their way."""
    text = str(tag)
    path = PurePosixPath(text)
    if not text.strip() or path.is_absolute() or ".." in path.parts or path == PurePosixPath(".") or "\0" in text:
        raise CheckpointError(f"tag {tag!r} is not the name of a folder below the checkpoint folder.")
    if text != text.strip() or any(part.startswith(".") for part in path.parts):
        raise CheckpointError(f"tag {tag!r} begins with a dot or has blanks at its ends.\n  Choose another tag.")
    return str(path)


def check_name(name: str, where: str) -> str:
    """A file name inside a checkpoint: one plain component. Raises CheckpointError for paths, "..", and hidden files."""
    if not name or name.startswith(".") or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"{where} names a file {name!r}, which is not a plain file name: refused.")
    return name


@contextlib.contextmanager
def open_plain(path: Path, is_direct: bool = False) -> Iterator[int]:
    """A descriptor for reading a regular file, past the page cache if `is_direct` and the file system can. Links, devices
    and pipes are refused. Raises CheckpointError."""
    # O_NONBLOCK: opening a pipe that nobody writes to must not wait.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            fd = os.open(path, flags | (getattr(os, "O_DIRECT", 0) if is_direct else 0))
        except OSError as error:
            if not is_direct or error.errno != errno.EINVAL:
                raise
            fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(
                f"{path} is a symbolic link: refused. A checkpoint's files are plain files."
            ) from error
        if error.errno == errno.ENOENT:
            raise CheckpointError(f"{path} is missing: the checkpoint is not whole.") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise CheckpointError(f"{path} is not a plain file: refused.")
        yield fd
    finally:
        os.close(fd)


def read_plain(path: Path, max_nbytes: int) -> bytes:
    """A whole small file, under the rules of `open_plain`. Raises CheckpointError if it is larger than allowed."""
    with open_plain(path) as fd:
        nbytes = os.fstat(fd).st_size
        if nbytes > max_nbytes:
            raise CheckpointError(f"{path} has {nbytes} bytes, more than the {max_nbytes} that it can have: refused.")
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read()

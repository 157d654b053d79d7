"""Where one rank's swap files lie, to whom they belong, and cleaning up after jobs that died.

    <nvme_path>/deepspeed_swap/<job>/rank<r>/lock     held by flock(2) while the rank lives; says who holds it
                                            /data     the store's file

Made by whoever builds the nvme tier, one per rank; used by the store.

The idea: the kernel gives a lock up when its process ends, however it ends, so "is the owner alive?" needs no process
numbers, which get reused. A folder whose lock can be had is stale and is removed when the next job starts. Folders are
made, and stale ones removed, under one more lock (`deepspeed_swap/lock`), so nobody meets a folder half made.

Invariant: a folder that may have a living owner is never touched. On a file system that other hosts may share, where a
lock may be local to its host, only folders of this very host (name and boot) are judged; the rest is left, and named in
a warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

from deepspeed.utils.errors import TierError
from deepspeed.utils.logging import logger, warn_once

ROOT = "deepspeed_swap"
LOCK = "lock"
WAIT_S = 60.0
"""For another rank that makes its folder or removes stale ones."""

LOCAL_FILE_SYSTEMS = frozenset("ext2 ext3 ext4 xfs btrfs f2fs zfs tmpfs ramfs overlay bcachefs jfs reiserfs".split())
"""Mounted by one host at a time (or in its memory), so that one kernel knows all of their locks."""
MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs"))


@final
class SwapFolder:
    """A rank's own folder under each of `paths`, and the locks that say so, until `close`."""

    def __init__(self, paths: Path | str | Sequence[Path | str], rank: int, job_id: str | None = None) -> None:
        """Make and lock the folders; remove stale ones of dead jobs beside them.

        Ranks of one job should agree on `job_id`, which names the folder above theirs; None is this process's own. Raises
        TierError if a path cannot be used, or the same job and rank is at work on it already.
        """
        self.rank = rank
        self.job_id = job_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        if not re.fullmatch(r"[\w.+:@=-]*\w[\w.+:@=-]*", self.job_id):
            raise TierError(
                f"[rank {rank}] job id {job_id!r} does not name a folder.\n  Use letters, digits, '-' and '_'."
            )
        given = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
        if not given or len({path.resolve() for path in given}) < len(given):
            raise TierError(f"[rank {rank}] nvme_path {[str(p) for p in given]}: name at least one folder, each once.")
        self.folders: tuple[Path, ...] = ()
        self._locks: list[int] = []
        self._finalizer = weakref.finalize(self, _remove, os.getpid(), self._locks, folders := [])  # type: ignore[var-annotated]
        try:
            for path in given:
                self._enter(path.absolute(), folders)
        except OSError as error:
            self.close()
            if isinstance(error, TierError):
                raise
            raise TierError(f"[rank {rank}] nvme_path {path}: {error.strerror or error}.\n  {_cure(error)}") from error
        except BaseException:
            self.close()
            raise
        self.folders = tuple(folders)
        self.check()

    def check(self) -> None:
        """Raise TierError if a folder was removed or replaced under way."""
        for folder, lock in zip(self.folders, self._locks, strict=True):
            if not os.fstat(lock).st_nlink or not folder.is_dir():
                raise TierError(
                    f"[rank {self.rank}] {folder} was removed while this job was using it.\n"
                    "  Keep the path mounted and exclude it from cleaners of temporary files; then start the job again."
                )

    def close(self) -> None:
        """Remove the folders and give the locks back. Again, or in a forked child, is nothing."""
        self._finalizer()

    def _enter(self, path: Path, folders: list[Path]) -> None:
        path.mkdir(exist_ok=True)  # the leaf only: a missing parent is a typo, or a disk that is not mounted
        root = path / ROOT
        with contextlib.suppress(FileExistsError):
            root.mkdir()
            root.chmod(0o1777)  # several users may share a disk; what is in it stays each one's own
        kind = file_system(path)
        if kind in MEMORY_FILE_SYSTEMS:
            warn_once(f"nvme_path {path} is in memory ({kind}): what is offloaded there still takes memory.")
        with _hold(root / LOCK, self.rank):
            remove_stale(root, is_shared=kind not in LOCAL_FILE_SYSTEMS)
            folder = root / self.job_id / f"rank{self.rank}"
            _make(folder)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not _try_lock(lock):
                owner = _owner(folder)
                os.close(lock)
                raise TierError(
                    f"[rank {self.rank}] {folder} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}"
                    f", since {owner.get('since', '?')}.\n  Give each job a path or a job id of its own, or end that process."
                )
            self._locks.append(lock)
            folders.append(folder)
            os.truncate(lock, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(lock, json.dumps({**_this_host(), "pid": os.getpid(), "since": since}).encode(), 0)


def remove_stale(root: Path, *, is_shared: bool) -> list[Path]:
    """Remove the folders of ranks that are dead for certain, and return them. Call with the root's lock held."""
    removed, doubtful = [], []
    for folder in _ranks_below(root):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if not folder.exists():
                continue
            lock = -1  # its maker died in the middle; makers hold the root's lock
        except OSError:
            continue  # another user's
        try:
            owner = _owner(folder)
            is_ours = all(owner.get(key) == value for key, value in _this_host().items())
            if lock >= 0 and not _try_lock(lock):
                continue
            if is_shared and not is_ours:
                doubtful.append(f"{folder} of {owner.get('host', 'an unknown host')}")
                continue
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
                removed.append(folder)
                folder.parent.rmdir()
        finally:
            if lock >= 0:
                os.close(lock)
    if removed:
        logger.info("removed swap files of dead jobs: %s", ", ".join(map(str, removed)))
    if doubtful:
        warn_once(
            f"swap files were left in place, as other hosts may use them: {', '.join(doubtful)}. Delete dead jobs'."
        )
    return removed


def _ranks_below(root: Path) -> list[Path]:
    """The ranks' folders of all jobs; jobs that end meanwhile are left out.

    A job that ends does not wait for the root's lock: it may be ending, by the garbage collector, in a process that is
    just holding it.
    """
    folders: list[Path] = []
    for job in sorted(root.iterdir()):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            folders += [job / name for name in sorted(os.listdir(job)) if name.startswith("rank")]
    return folders


def _make(folder: Path) -> None:
    """Make the folder and its job's, which another rank that ends may be taking away when it sees it empty."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            return folder.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, as mount(8) names it; "" where that is not known."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds: dict[Path, tuple[str, str]] = {}
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            fields = before.split()
            kinds[Path(fields[4].encode().decode("unicode_escape"))] = (fields[2], after.split()[0])
    resolved = path.resolve()
    for mounted in (resolved, *resolved.parents):
        if mounted in kinds:
            return kinds[mounted][1]
    return next((kind for mounted_number, kind in kinds.values() if mounted_number == number), "")


@contextlib.contextmanager
def _hold(path: Path, rank: int) -> Iterator[None]:
    """The lock of the folder's root, for a moment."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.fchmod(lock, 0o666)
    try:
        deadline = time.monotonic() + WAIT_S
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise TierError(
                    f"[rank {rank}] {path} has been locked for {WAIT_S:g} s by another process that starts up.\n"
                    "  See which one with `lslocks`, end it, and start again."
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise TierError(
                "nvme_path: this file system has no file locks, so nothing tells its jobs apart.\n  Use a local disk."
            ) from error
        raise
    return True


def _owner(folder: Path) -> dict[str, Any]:
    try:
        owner = json.loads((folder / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _this_host() -> dict[str, str]:
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"host": socket.gethostname(), "boot": boot}


def _remove(pid: int, locks: list[int], folders: list[Path]) -> None:
    if os.getpid() != pid:
        return  # a forked child holds copies; the parent still works with them
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # the last rank's
    for lock in locks:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child's copy would keep it otherwise
        os.close(lock)


def _cure(error: OSError) -> str:
    return {
        errno.ENOENT: "Its parent does not exist: mount the disk, or correct the path.",
        errno.EACCES: "Make it writable for this user, or choose another path.",
        errno.EPERM: "Make it writable for this user, or choose another path.",
        errno.EROFS: "It is mounted read-only; remount it, or choose another path.",
        errno.ENOTDIR: "Name a folder, not a file.",
        errno.EEXIST: "Name a folder, not a file.",
        errno.ENOSPC: "The disk is full; free some space, or choose another path.",
        errno.EDQUOT: "Your quota on it is used up; free some space, or choose another path.",
    }.get(error.errno or 0, "Choose a path on a working local disk.")

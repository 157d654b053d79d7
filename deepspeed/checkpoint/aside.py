"""Folders beside the target: where a save is written until it is whole, how it takes the target's place, what goes.

Used by `save` on the first rank. A save writes to `.<tag>.<8 hex>.tmp`, which it holds locked; the kernel takes the lock
back from a process that dies, so whoever finds an unlocked one may delete it.

Invariant: at every instant the target's name leads to a whole checkpoint, the old or the new. Where the system cannot
exchange two folders, the old one is for an instant only under `.<tag>.<8 hex>.old`, where readers look too.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import uuid
from pathlib import Path

from deepspeed.checkpoint import files
from deepspeed.checkpoint.find import LATEST, LATEST_UNIVERSAL
from deepspeed.checkpoint.manifest import FILE_NAME
from deepspeed.utils.errors import CheckpointError
from deepspeed.utils.logging import logger

ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|trash|old)")


class Lock:
    """Says that a folder is being written to; the kernel takes it back from a process that dies."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Give it back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_aside(target: Path) -> tuple[Path, Lock]:
    """A new folder beside the target, locked. Raises CheckpointError where the target's name is taken by something else."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} exists and is not a folder.\n  Choose another tag.")
    remove_stale(target.parent)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir()
    try:
        return aside, Lock(aside)
    except BaseException:
        remove_if_possible(aside)
        raise


def remove_stale(parent: Path) -> None:
    """Delete what saves that died have left in a folder; those still being written are locked and stay. Afterwards the space
    of everything that was removed is free."""
    files.finish_removals()
    for entry in os.scandir(parent):
        if ASIDE.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            if entry.name.endswith(".old") and not (parent / entry.name[1:-13]).exists():
                continue  # the only copy: a replacement died between its two renames
            try:
                lock = Lock(Path(entry.path))
            except OSError:
                continue
            files.remove_tree(Path(entry.path))
            lock.release()
    files.finish_removals()


def remove_if_possible(folder: Path) -> None:
    """Delete a folder that nobody needs; a disk that refuses is no reason to call a save failed, or to hide why it was."""
    try:
        files.remove_tree(folder)
    except OSError as error:
        logger.warning("%s could not be removed: %s", folder, error)


def put_in_place(aside: Path, target: Path) -> None:
    """Publish a whole folder under its name. Where the system can exchange folders there is no instant without one."""
    if not target.exists():
        os.rename(aside, target)
        files.sync_folder(target.parent)
        return
    old = aside
    if not files.swap(aside, target):
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        os.rename(target, old)
        os.rename(aside, target)
    files.sync_folder(target.parent)
    _keep_foreign_files(old, target)
    remove_if_possible(old)


def _keep_foreign_files(old: Path, new: Path) -> None:
    """Carry over what others put beside the old checkpoint's own files."""
    try:
        own = set(json.loads((old / FILE_NAME).read_bytes())["files"]) | {FILE_NAME}
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    for entry in os.scandir(old):
        is_own = entry.name in own or entry.name.endswith("_states.pt")
        if not is_own and not (new / entry.name).exists():
            os.rename(entry.path, new / entry.name)


def retain(folder: Path, keep: int, newest: Path) -> None:
    """Delete the oldest checkpoints of a folder beyond the newest `keep`; never `newest`, nor what `latest` or
    `latest_universal` names."""
    named = [folder / name for name in (LATEST, LATEST_UNIVERSAL)]
    protected = {newest, *(folder / path.read_text().strip() for path in named if path.exists())}
    found = []
    for entry in os.scandir(folder):
        manifest = Path(entry.path, FILE_NAME)
        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False) and manifest.is_file():
            found.append((manifest.stat().st_mtime_ns, Path(entry.path)))
    for _, path in sorted(found, reverse=True)[keep:]:
        if path not in protected:
            logger.info("removing %s: checkpoint.keep_last_n is %d", path, keep)
            remove_if_possible(path)

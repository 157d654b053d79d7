"""The autotuner's files, written whole or not at all; a folder that cannot be written to is one error that says so.

<exps>/<name>.json            a trial before it runs: name, configuration
<results>/<name>/             ds_config.json exp.json cmd.txt stdout.log stderr.log metrics.json
<results>/state.json          the search: what was asked, what came of each trial; from it an interrupted one goes on
<results>/summary.txt report.html ds_config_optimal.json cmd_optimal.txt

Disks fill while a trial runs, too, by its own logs or by something else: whoever waits for one asks `check_room` meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.whole_files import write_whole

NEEDED_NBYTES = 8 << 20
"""Free space to begin with; logs of trials need most."""
LEAST_NBYTES = 1 << 20
"""Free space to go on with: what is known of a search can be written with less."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
OWN = "[INFO] [launcher]"
"""In lines that say nothing of the script."""
OURS = "state.json"
"""Marks a results folder as one that the autotuner made, so that nothing else is ever removed."""
LONGEST = 500
"""Characters of a log's line that are shown."""


class ResultsError(DeepSpeedError):
    """The search's files cannot be written: nothing more can be learnt, and what was is kept."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """While entered, an OSError is a ResultsError about `path`, with the way out."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole. Raises ResultsError."""
    with writing(path):
        write_whole(path, text)


def write_json(path: Path, values: Any) -> None:
    """The same, as JSON."""
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """What a file holds; None where it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def cannot_write(path: Path, error: OSError) -> ResultsError:
    """The error for a file or folder that could not be written to."""
    if error.errno in NO_SPACE:
        what = f"no space is left for results: {path} ({_room(path)})"
        cure = (
            "Free some space and start the same command again, which goes on where it stopped; or set autotuning.results_dir and "
            "autotuning.exps_dir to folders on another disk."
        )
    else:
        what = f"results cannot be written: {path}: {error.strerror}"
        cure = "Set autotuning.results_dir and autotuning.exps_dir to folders that you may write to."
    return ResultsError(f"autotuning: {what}.\n  {cure}")


def _room(path: Path) -> str:
    """How much of a path's disk is free, and the largest log there, which may be what fills it."""
    folder = next(each for each in (path, *path.parents) if each.is_dir())
    usage = shutil.disk_usage(folder)
    text = f"{usage.free / 2**20:.1f} of {usage.total / 2**20:,.0f} MiB are free on its disk"
    logs = {log: log.stat().st_size for pattern in ("*.log", "*/*.log") for log in folder.glob(pattern)}
    largest = max(logs, key=logs.__getitem__, default=None)
    if largest is None or logs[largest] < LEAST_NBYTES:
        return text
    return f"{text}; {largest} has {logs[largest] / 2**20:,.0f} MiB"


def check_room(folder: Path, nbytes: int = LEAST_NBYTES) -> None:
    """See that a folder can be written to, and that so much is free. Makes it. Raises ResultsError."""
    tried = folder / f".writable.{os.getpid()}"
    with writing(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tried.write_bytes(bytes(4096))
            usage = shutil.disk_usage(folder)
            if usage.total and usage.free < nbytes:  # some file systems do not say
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            with contextlib.suppress(OSError):
                tried.unlink(missing_ok=True)


@contextlib.contextmanager
def held(*folders: Path) -> Iterator[None]:
    """Have folders for this search alone while entered; the kernel gives them back however it ends. Raises DeepSpeedError
    where another search has one of them. File systems without locks do not tell."""
    with contextlib.ExitStack() as stack:
        for folder in dict.fromkeys(folders):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DeepSpeedError(
                    f"autotuning: another search works in {folder} now.\n"
                    "  Wait for its end, or set autotuning.results_dir and autotuning.exps_dir to other folders."
                ) from None
            except OSError:
                continue
        yield


def clear(results: Path, exps: Path, names: list[str]) -> None:
    """Remove what an earlier search left: its trials by name, and its summary files. Other files stay."""
    with writing(results):
        for name in names:
            (exps / f"{name}.json").unlink(missing_ok=True)
            shutil.rmtree(results / name, ignore_errors=True)
        for name in (OURS, "summary.txt", "report.html", "ds_config_optimal.json", "cmd_optimal.txt"):
            (results / name).unlink(missing_ok=True)


def tail(path: Path, num_lines: int = 12, most: int = 16000, keep: str = " failed first (") -> str:
    """The last lines of a log; the last one with `keep` in it, which says whose they are, is kept where it stands before them."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip() and OWN not in line]
    heads = [line for line in lines[:-num_lines] if keep in line][-1:]
    return "\n".join(map(_clipped, heads + lines[-num_lines:]))


def _clipped(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"

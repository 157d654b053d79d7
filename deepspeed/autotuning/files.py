"""The autotuner's files, written whole or not at all; a full disk is one error that says so.

<exps>/<name>.json            a trial before it runs: name, configuration
<results>/<name>/             ds_config.json exp.json cmd.txt stdout.log stderr.log metrics.json
<results>/state.json          the search: what was asked, what came of each trial; from it an interrupted one goes on
<results>/summary.txt report.html ds_config_optimal.json cmd_optimal.txt
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from deepspeed.utils.errors import DeepSpeedError

NEEDED_NBYTES = 8 << 20
"""Free space to begin with; logs of trials need most."""
OWN = "[INFO] [launcher]"
"""In lines that say nothing of the script."""
OURS = "state.json"
"""Marks a results folder as one that the autotuner made, so that nothing else is ever removed."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole. Raises DeepSpeedError with the way out where that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True) if aside.parent.is_dir() else None
        raise cannot_write(path, error) from None


def write_json(path: Path, values: Any) -> None:
    """The same, as JSON."""
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """What a file holds; None where it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def cannot_write(path: Path, error: OSError) -> DeepSpeedError:
    """The error for a file that could not be written."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cure = (
        "Free some space and start the same command again, which goes on where it stopped; or set autotuning.results_dir and "
        "autotuning.exps_dir to folders on another disk."
        if is_full
        else "Set autotuning.results_dir and autotuning.exps_dir to folders that you may write to."
    )
    what = "no space is left for results" if is_full else f"results cannot be written: {error.strerror}"
    return DeepSpeedError(f"autotuning: {what} ({path}).\n  {cure}")


def make_folders(results: Path, exps: Path) -> None:
    """Make both, and see that they can be written to and have room."""
    for folder in (results, exps):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable.{os.getpid()}"
            probe.write_bytes(bytes(4096))
            probe.unlink()
            if shutil.disk_usage(folder).free < NEEDED_NBYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(folder, error) from None


def clear(results: Path, exps: Path, names: list[str]) -> None:
    """Remove what an earlier search left: its trials by name, and its summary files. Other files stay."""
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
    return "\n".join(heads + lines[-num_lines:])

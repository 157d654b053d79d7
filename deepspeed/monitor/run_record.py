"""run.jsonl: what a run was and what each of its steps took, one JSON object per line.

Written by the engine's step monitor on rank 0 into the run directory, and appended to by a run that is started again in
it. Read by `deepspeed report` and `deepspeed top`, also while it is being written. Pure: no torch.

    {"kind": "start", ...}           once per start: model, ranks, ZeRO stage, batch, time
    {"kind": "step", "step": 1, ...} see `step.py` for its fields; seconds, bytes, plain numbers
    {"kind": "event", "name": ...}   what a script logs with `engine.monitor.write_events`
    {"kind": "comm", ...}            the log of collectives so far, where `comms_logger` is on
    {"kind": "pipeline", "name": "1f1b", "measured": [...], "planned": [...]}   one batch's actions on every rank, now and then
    {"kind": "experts", "layers": {"layers.0": [9, 7]}}    tokens of each expert in one step, now and then

Invariant: a line is complete or not there. Readers skip a last line that is still being written, and anything whose kind
they do not know, so that fields and kinds can be added.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "run.jsonl"


class RunRecordError(ValueError):
    """A directory holds no record of a run."""


class RunWriter:
    """Appends lines to `<folder>/run.jsonl`; a `Backend`, so it may raise OSError."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / NAME
        self._file = self._path.open("a", encoding="utf-8")
        self._separator = ""

    def add(self, kind: str, **values: Any) -> None:
        """Write one line; it is in the file when this returns."""
        self.add_all(kind, [values])

    def add_all(self, kind: str, lines: Iterable[dict[str, Any]]) -> None:
        """Write some lines at once."""
        try:
            text = "".join(f"{_to_json({'kind': kind, **values})}\n" for values in lines)
            self._file.write(f"{self._separator}{text}")
            self._file.flush()
            self._separator = ""
        except OSError:
            # A new file object forgets what could not be flushed; what of it is on the disk becomes a line of its own.
            self._file, self._separator = self._path.open("a", encoding="utf-8"), "\n"
            raise

    def write(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Events of scripts, one line for each."""
        self.add_all("event", [{"name": name, "value": value, "samples": at} for name, value, at in events])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _to_json(values: dict[str, Any]) -> str:
    try:
        return _ENCODER.encode(values)
    except ValueError:
        return _ENCODER.encode(_finite(values))


_ENCODER = json.JSONEncoder(separators=(",", ":"), default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no inf and nan; they are written as strings, which float() reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@dataclass
class RunRecord:
    """A run as its record tells it."""

    name: str
    start: dict[str, Any] = field(default_factory=dict)
    """Of the last start."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """In order; a step that was trained again after a restart is there once, as it went last."""
    comm: dict[str, Any] | None = None
    """The last log of collectives."""
    experts: dict[str, Any] | None = None
    """The last table of tokens per expert."""
    pipeline: dict[str, Any] | None = None
    """The last batch of a pipeline that was told."""
    num_starts: int = 0

    def add(self, lines: Iterable[str]) -> None:
        """Take in more lines of the file."""
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            kind = entry.get("kind") if isinstance(entry, dict) else None
            if kind == "start":
                self.start, self.num_starts = entry, self.num_starts + 1
            elif kind == "step" and isinstance(entry.get("step"), int):
                while self.steps and self.steps[-1]["step"] >= entry["step"]:  # started from an earlier checkpoint
                    self.steps.pop()
                # One copy of each key for all steps: 342 MB instead of 499 MB for 100,000 steps.
                self.steps.append({sys.intern(key): value for key, value in entry.items()})
            elif kind == "comm":
                self.comm = entry
            elif kind == "experts":
                self.experts = entry
            elif kind == "pipeline":
                self.pipeline = entry

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of one field, given by a dotted path, where it was written."""
        found = []
        for step in self.steps:
            value: Any = step
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                found.append((int(step["step"]), float(value)))
        return found


def read_lines(lines: Iterable[str], name: str) -> RunRecord:
    """The record that some lines hold."""
    record = RunRecord(name)
    record.add(lines)
    return record


def find_records(folder: Path) -> list[Path]:
    """The records in a run directory, or in the run directories directly below a folder, oldest name first.

    Raises RunRecordError if there is none.
    """
    own = folder / NAME
    found = [own] if own.is_file() else sorted(folder.glob(f"*/{NAME}")) if folder.is_dir() else []
    if not found:
        what = f"has no {NAME}, and no folder in it has" if folder.is_dir() else "is not a directory"
        raise RunRecordError(
            f"{folder} {what}.\n  Name a run directory: the folder that monitor.run_dir of the configuration, "
            "the launcher's --run_dir or DS_RUN_DIR named for a training run."
        )
    return found


def read_records(folder: Path) -> list[RunRecord]:
    """All records that `find_records` finds."""
    records = []
    for path in find_records(folder):
        with path.open(encoding="utf-8", errors="replace") as file:
            records.append(read_lines(file, path.parent.name or str(path.parent.resolve().name)))
    return records

"""Files that are there whole or not at all, whatever ends their writer."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from deepspeed.utils.errors import DeepSpeedError


def write_whole(path: Path, text: str) -> None:
    """Write a text so that a reader finds all of it, or what was there before. Makes its folder. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_page(path: Path, text: str) -> None:
    """Write what a command's --html asks for. Raises DeepSpeedError where that fails."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise DeepSpeedError(
            f"{path} cannot be written: {error.strerror}.\n  Name a file that can be written after --html."
        ) from None

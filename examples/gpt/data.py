"""Text as bytes: the Python standard library's own sources, or files the user names.

A batch is a pure function of (seed, index, rank): no state to save, the same on every machine with the same Python,
and one process can compute the batches of all ranks, which is what `train.py --plain` does.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MAX_BYTES = 16 * 2**20
VALIDATION_EVERY = 10
"""One file in ten is kept for validation; of a single file, the last tenth."""


def standard_library() -> list[Path]:
    """The sources that come with the running interpreter, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}
    return [path for path in sorted(root.rglob("*.py")) if not skipped & {*path.relative_to(root).parts}]


class Text:
    """Training and validation bytes, and random windows of them."""

    def __init__(self, path: Path | None = None) -> None:
        self.train, self.validation = _split(path)
        if min(len(self.train), len(self.validation)) < 4096:
            raise ValueError(f"{path}: too little text; give at least 64 KB.")

    def batch(
        self, split: str, samples: int, seq: int, *, seed: int, index: int, rank: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(x, y), each [samples, seq]: y is x one byte later. Ranks and indices draw independent windows."""
        data = {"train": self.train, "validation": self.validation}[split]
        starts = np.random.default_rng([seed, index, rank]).integers(len(data) - seq - 1, size=samples)
        windows = torch.from_numpy(np.stack([data[start : start + seq + 1] for start in starts])).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _split(path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    if path is not None and path.is_file():
        data = np.fromfile(path, dtype=np.uint8, count=MAX_BYTES)
        cut = len(data) - len(data) // VALIDATION_EVERY
        return data[:cut], data[cut:]
    files = standard_library() if path is None else sorted(p for p in path.rglob("*") if p.is_file())
    is_validation = [i % VALIDATION_EVERY == 0 for i in range(len(files))]
    train = _read(file for file, held_out in zip(files, is_validation, strict=True) if not held_out)
    return train, _read(file for file, held_out in zip(files, is_validation, strict=True) if held_out)


def _read(files: Iterator[Path]) -> np.ndarray:
    """The bytes of the files, one after the other, up to MAX_BYTES."""
    text = bytearray()
    for file in files:
        text += file.read_bytes()
        if len(text) >= MAX_BYTES:
            break
    return np.frombuffer(bytes(text[:MAX_BYTES]), dtype=np.uint8)

"""What a checkpoint to be loaded must answer, whoever wrote it.

Implemented by `store.Stored` (our format) and `original.Original` (the original's files); used by `load`,
`zero_to_fp32`, `export` and the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from deepspeed.checkpoint.boxes import Box
from deepspeed.checkpoint.manifest import ParameterInfo, StoredTensor


@dataclass(frozen=True)
class Wanted:
    """Elements [start, start + numel) of a box of a tensor, for `sink(offset, values)`: 1-D, stored dtype, offset from
    `start`."""

    kind: str
    name: str
    start: int
    numel: int
    sink: Callable[[int, Tensor], None]
    box: Box | None = None
    """None is the whole tensor."""


class Source(Protocol):
    """One checkpoint, open for reading. `tensors[kind][name]`; `state` is decoded, see `save` for its keys."""

    folder: Path
    about: dict[str, Any]
    parameters: dict[str, ParameterInfo]
    tied: dict[str, str]
    tensors: dict[str, dict[str, StoredTensor]]

    def state(self) -> dict[str, Any]:
        """The first rank's state."""
        ...

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """One rank's own state; None where the checkpoint has none."""
        ...

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Deliver elements to their sinks. Raises CheckpointError, naming file and tensor, for damage."""
        ...

"""All ranks succeed or all raise: the exchange of small records between the ranks of a save or load.

Used by `save` and `load`, also from the thread of an asynchronous save, for which it has a process group of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from deepspeed.mesh import Mesh
from deepspeed.utils.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The data-parallel ranks, as those who write one checkpoint. Collective to make, and in every method."""

    def __init__(self, mesh: Mesh) -> None:
        self.members = mesh.ranks_of("dp")
        self.rank = mesh.dp_rank
        self._group = mesh.group("dp", "checkpoint", "gloo")

    @property
    def world_size(self) -> int:
        """How many ranks take part."""
        return len(self.members)

    @property
    def is_first(self) -> bool:
        """Whether this rank publishes."""
        return self.rank == 0

    def to_first(self, value: Any) -> list[Any] | None:
        """Everybody's value, on the first rank."""
        if self._group is None:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, found, dst=self.members[0], group=self._group)
        return found

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.members[0], group=self._group)
        return box[0]

    def all(self, value: Any) -> list[Any]:
        """Everybody's value, on every rank."""
        return self.from_first(self.to_first(value))

    def together(self, what: str, step: Callable[[], T]) -> T:
        """Run `step` on every rank; if it raises anywhere, raise CheckpointError everywhere, naming the ranks."""
        error: BaseException | None = None
        result: Any = None
        try:
            result = step()
        except Exception as caught:
            error = caught
        self.raise_any(what, error)
        return result

    def raise_any(self, what: str, error: BaseException | None) -> None:
        """Raise on every rank if any rank has an error; where there is only this rank, its own."""
        texts = self.all(None if error is None else describe(error))
        failed = {rank: text for rank, text in zip(self.members, texts, strict=True) if text}
        if not failed:
            return
        if self.world_size == 1 and isinstance(error, CheckpointError):
            raise error
        distinct: dict[str, list[int]] = {}
        for rank, text in failed.items():
            distinct.setdefault(text, []).append(rank)
        lines = [f"[rank {', '.join(map(str, ranks))}] {text}" for text, ranks in distinct.items()]
        raise CheckpointError(f"{what} failed.\n" + "\n".join(lines)) from error

    def on_first(self, what: str, step: Callable[[], T]) -> T:
        """Run `step` on the first rank alone; its result, or its error, is everybody's."""
        return self.from_first(self.together(what, lambda: step() if self.is_first else None))


def describe(error: BaseException) -> str:
    """An error in a line; ours have the words already."""
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {error}"

"""All ranks succeed or all raise: the exchange of small records between the ranks of a save or load.

Used by `save` and `load`, also from the thread of an asynchronous save, for which it has a process group of its own.

The group's own methods are called, not torch.distributed's functions: those know a group no longer once the script has
called `destroy_process_group()`, which many do as their last line, while a save is still on its way. The connections
live as long as the group object (torch 2.13, gloo).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.mesh import Mesh
from deepspeed.utils.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The data-parallel ranks, as those who write one checkpoint. Collective to make, and in every method."""

    def __init__(self, mesh: Mesh) -> None:
        self.members = mesh.ranks("checkpoint")
        self.rank = mesh.rank("checkpoint")
        self._group = mesh.group("checkpoint", "checkpoint", "gloo")
        # Where this object has the group's last reference, torch 2.6 joins gloo's threads with the interpreter locked, and
        # such a thread needs it to let go of a tensor that Python has forgotten. So none is, until after the group.
        self._messages: list[Tensor] = []

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
        own = _to_bytes(value)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in self.members]
        count = torch.tensor([own.numel()])
        self._messages += [*counts, count]
        self._group.allgather([counts], [count]).wait()
        longest = max(int(count) for count in counts)
        padded = torch.cat([own, torch.zeros(longest - own.numel(), dtype=torch.uint8)])
        theirs = [torch.empty_like(padded) for _ in self.members] if self.is_first else []
        self._messages += [padded, *theirs]
        self._group.gather([theirs] if self.is_first else [], [padded], _to_rank_0(dist.GatherOptions())).wait()
        return [_to_value(data, count) for data, count in zip(theirs, counts, strict=True)] if self.is_first else None

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self._group is None:
            return value
        data = _to_bytes(value) if self.is_first else torch.empty(0, dtype=torch.uint8)
        count = torch.tensor([data.numel()])
        self._messages += [count, data]
        self._group.broadcast([count], _to_rank_0(dist.BroadcastOptions())).wait()
        if not self.is_first:
            data = torch.empty(int(count), dtype=torch.uint8)
            self._messages.append(data)
        self._group.broadcast([data], _to_rank_0(dist.BroadcastOptions())).wait()
        return value if self.is_first else _to_value(data, count)

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


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _to_value(data: Tensor, count: Tensor) -> Any:
    return pickle.loads(data[: int(count)].numpy().tobytes())


def _to_rank_0(options: Any) -> Any:
    options.rootRank = 0
    return options

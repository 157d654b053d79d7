"""Process groups that a script asked for by name, not an engine: experts', tensor parallel ranks', a grid's.

Made at once by the functions that create them (`deepspeed.utils.groups`, pipeline grids), kept for as long as the
default group they belong to, and looked up by name. The engine's own groups are the mesh's.

Invariant: making is collective over the job and done once per name; asking is not collective and never makes a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from deepspeed.comm.choose import timeout_of
from deepspeed.mesh.shape import Group
from deepspeed.utils.errors import DeepSpeedError

ProcessGroup = Any


class Made(NamedTuple):
    """One way to group all ranks, and this rank's group in it."""

    groups: tuple[Group, ...]
    own: Group
    group: ProcessGroup


class ScriptGroups:
    """The groups of one process; those of a default group that was destroyed are forgotten."""

    def __init__(self) -> None:
        self._world: Any = None
        self._made: dict[str, Made] = {}

    def share(self, kind: str, groups: Sequence[Sequence[int]]) -> Made:
        """As `make`, under a name that follows from the groups: whoever asks for equal ones shares them."""
        return self.make(f"{kind} {[list(ranks) for ranks in groups]}", groups, f"{kind}.script")

    def make(self, name: str, groups: Sequence[Sequence[int]], description: str = "") -> Made:
        """Make groups that partition the ranks, or find them made. Collective over the job.

        Raises DeepSpeedError if other groups were made under that name.
        """
        wanted = tuple(tuple(ranks) for ranks in groups)
        before = self._known().get(name)
        if before is not None:
            if before.groups != wanted:
                raise DeepSpeedError(
                    f"groups {name!r} were made before as {[list(ranks) for ranks in before.groups]}, and are now asked for as "
                    f"{[list(ranks) for ranks in wanted]}.\n  A process has one such set; use one size everywhere."
                )
            return before
        rank = dist.get_rank()
        own = next(ranks for ranks in wanted if rank in ranks)
        made = [dist.new_group(list(ranks), timeout_of(), group_desc=description or name) for ranks in wanted]
        self._made[name] = Made(wanted, own, made[wanted.index(own)])
        return self._made[name]

    def find(self, name: str) -> Made | None:
        """The groups of a name, or None."""
        return self._known().get(name)

    def rename(self, name: str, now: str) -> None:
        """Have groups be found by another name, so that others can be made under theirs."""
        known = self._known()
        known[now] = known.pop(name)

    def forget(self, name: str) -> None:
        """Have a name no longer stand for groups; whoever asks destroys them."""
        self._known().pop(name, None)

    def names(self) -> list[str]:
        """Of all groups, in the order in which they were made."""
        return list(self._known())

    def _known(self) -> dict[str, Made]:
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if world is not self._world:
            self._world, self._made = world, {}
        return self._made

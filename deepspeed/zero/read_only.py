"""What was changed in parameters that were brought together to be read, where each rank has a part of them.

Used by `zero.access.GatheredParameters` without a `modifier_rank`: when it ends, ranks have their own parts as they were before, and
what a script wrote is gone. That is told, by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from deepspeed.utils.logging import warn_once
from deepspeed.zero.param import buckets_of
from deepspeed.zero.prints import Prints

_open: list[ReadOnly] = []
"""The contexts that a script is in, from the outermost one on."""


class ReadOnly:
    """Parameters that are whole from now until `close`, with all others of their buckets."""

    def __init__(self, params: Iterable[Any]) -> None:
        self._asked = dict.fromkeys(param for param in params if isinstance(param, nn.Parameter))
        self._buckets = [bucket for bucket in buckets_of(self._asked) if bucket.layout.world_size > 1]
        self._prints = Prints()
        self._prints.watch(self._buckets)
        _open.append(self)

    def close(self) -> None:
        """The context ends, and what it knows of its buckets' memory goes."""
        _open.remove(self)
        self._prints.watch(())

    def warn_of_changes(self) -> None:
        """Of what was assigned (`param.data = ...`), or written in place as far as a sample of each bucket shows."""
        assigned = [bucket.names[i] for bucket in self._buckets for i, _ in bucket.assigned()]
        written = [
            bucket.name_of(param)
            for bucket in self._prints.written()
            for param in bucket.params
            if param in self._asked
        ]
        changed = assigned or written
        if changed:
            among = "" if assigned or len(written) == 1 else "one of "
            names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            warn_once(
                f"GatheredParameters: {among}{names} was changed inside, and is what it was again: each rank has a part, and nothing "
                "says whose changes are meant.\n"
                "  Give modifier_rank=0 to keep those of rank 0, on every rank."
            )


def note_kept() -> None:
    """What has just been changed inside of open contexts is kept: a context inside of them had a `modifier_rank`, or a function wrote
    a whole value."""
    for context in _open:
        context._prints.renew()

"""How long parts of a layer's last forward took, in milliseconds: for `wall_clock_breakdown`.

Held by a layer's place, so that `dispatch` adds the exchanges without knowing the layer. Off, nothing is timed and nothing waits for
the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from deepspeed.accelerator import get_accelerator


class Times:
    """Parts by name; each is of the last time it ran."""

    def __init__(self) -> None:
        self.is_on = False
        self.milliseconds: dict[str, float] = {}

    def __getitem__(self, part: str) -> float:
        """0 where the part did not run."""
        return self.milliseconds.get(part, 0.0)

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Time what is in the block, if anybody asks."""
        if not self.is_on:
            yield
            return
        get_accelerator().synchronize()
        start = time.perf_counter()
        yield
        get_accelerator().synchronize()
        self.milliseconds[part] = (time.perf_counter() - start) * 1e3

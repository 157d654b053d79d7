"""Parameters of which no rank had a gradient in a step: like plain PyTorch, the update leaves them out.

Asked by the optimizer's step where the norm says that some rank missed a gradient; `zero.update` reads the answer.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, final

from deepspeed.mesh import Mesh
from deepspeed.zero.master import Master
from deepspeed.zero.reduce import Reducer

Used = list[list[int] | None]
"""Per bucket, the parameters that had a gradient on one rank; None where all had."""


@final
class Unused:
    """Of one optimizer. `masters` grows."""

    def __init__(self, masters: Sequence[Master], reducer: Reducer, mesh: Mesh) -> None:
        self._masters, self._reducer, self._mesh = masters, reducer, mesh
        self.pairs: list[tuple[int, int]] = []
        """(bucket, parameter) that the next update leaves out."""

    def here(self) -> Used:
        """What had a gradient on this rank, until the reducer drops them."""
        return [sorted(g.arrivals.used) if g.arrivals.misses_any else None for g in self._reducer.gradients]

    def leave_out(self, used: Used | None) -> None:
        """Have the update leave out the parameters that no rank has `used`, and those that the script took gradients away
        from. Collective, but where nothing was missing on any rank: None."""
        unused = self._agree(used) if used is not None else []
        self.pairs = [*unused, *(pair for pair in self._reducer.left_out if pair not in unused)]

    def _agree(self, mine: Used) -> list[tuple[int, int]]:
        # Usually a parameter misses its gradient on every rank, step after step: then a digest says all there is to say.
        digest = zlib.crc32(repr(mine).encode())
        is_same = all(theirs == digest for (theirs,) in self._mesh.agree("average", digest))
        everyone: list[Any] = [mine] if is_same else self._mesh.gather_objects("average", mine)
        unused: list[tuple[int, int]] = []
        for i, master in enumerate(self._masters):
            used = [theirs[i] for theirs in everyone]
            if all(indices is not None for indices in used):
                seen = set().union(*used)
                unused += [(i, j) for j in range(len(master.bucket.params)) if j not in seen]
        return unused

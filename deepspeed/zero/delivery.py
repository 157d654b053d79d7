"""Reduced gradients of a bucket that rest on a tier, between their reduction and the step that reads them.

Owned by a bucket's `zero.gradients`; read by the step. They are stored while backward goes on; their norm is taken on the way.
Where gradients rest in the device's memory they stay where the reduction left them, and there is nothing to do.

Invariant: a buffer whose bytes are on their way to a tier is given back when they have arrived.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, final

from torch import Tensor

from deepspeed.tiers import Rest, Transfer
from deepspeed.utils.errors import TierError
from deepspeed.zero.gradients import FlatBuffer, FlatPool, norm_of


class _Storing(NamedTuple):
    """A store that is under way: what is read until then, and the buffer it lies in, if that is borrowed."""

    values: Tensor
    transfer: Transfer
    buffer: FlatBuffer | None


@final
class Moved:
    """They rest on a tier."""

    def __init__(self, rest: Rest, pool: FlatPool) -> None:
        self.failure: TierError | None = None
        """Gradients that could not be moved to their rest; told at the step, on every rank."""
        self.norm: Tensor | None = None
        """2-norm of what was put last, fp32."""
        self._rest, self._pool = rest, pool
        self._storing: deque[_Storing] = deque()

    @property
    def rest(self) -> Rest:
        """The bytes at rest."""
        return self._rest

    @property
    def nbytes(self) -> int:
        """How many there are."""
        return self._rest.numel * self._rest.dtype.itemsize

    def put(self, values: Tensor, buffer: FlatBuffer | None = None) -> None:
        """Start bringing `values` to rest; `buffer`, in which they may lie, goes back to its pool when they are there."""
        self.norm = norm_of(values)
        self._storing.append(_Storing(values, self._rest.start_store(0, values), buffer))
        self._pool.note_storing(self._finish_oldest)

    def start_load(self, into: Tensor) -> Transfer:
        """Start reading what is at rest, once everything has arrived there."""
        self.wait()
        return self._rest.start_load(0, into)

    def load(self, into: Tensor, started: Transfer | None) -> None:
        """Have in `into` what is at rest; `started` is the load, if it is under way. Zeros after a failure."""
        try:
            (started or self.start_load(into)).wait()
        except TierError as error:
            self.failure = self.failure or error
            into.zero_()

    def wait(self) -> None:
        """Have everything at rest."""
        while self._storing:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        if not self._storing:  # waited for already, since the pool was told of it
            return
        storing = self._storing.popleft()
        try:
            storing.transfer.wait()
        except TierError as error:
            self.failure = self.failure or error
        if storing.buffer is not None:
            self._pool.give_back(storing.buffer)

    def forget(self) -> None:
        """Begin a new step."""
        self.wait()
        self.norm = self.failure = None

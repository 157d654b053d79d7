"""How one bucket's gradients are averaged, as a row: over whom, by what, in which dtype on the wire, and when.

Made in `assembly.assemble`, one per trained bucket; carried out by `zero.gradients` and its kin, asked by
`zero.reduce`. Buckets with a reduction of their own (experts, compressed communication) are other rows and not other code.

Invariant: of a bucket's row nothing but `when` changes while an engine lives.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed.comm.exchange import Exchange
from deepspeed.comm.feedback import ErrorFeedback


class When(enum.Enum):
    """Which backward passes make a bucket's gradients leave the rank."""

    EACH_BACKWARD = "each backward"
    """There is no full buffer to add micro-batches up in: every one is reduced and added to the result."""
    AT_BOUNDARY = "at the boundary"
    """Micro-batches add up on the rank; the last one of a step has the sum reduced."""
    NEVER = "never"
    """The optimizer communicates in its own way: the rank's own sum is what it gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """How one bucket's gradients are averaged: over whom, by what, in which dtype on the wire, and when."""

    exchange: Exchange
    """Over the ranks that share the bucket's shards."""
    feedback: Sequence[ErrorFeedback] = ()
    """What the exchange keeps of its messages' errors."""
    replicas: Exchange | None = None
    """Over the ranks that repeat this one's shard, where there are any: averaged with them at the boundary."""
    predivide: float = 1.0
    """Divides before the sum, which keeps low precision from overflowing."""
    divide_by: float = 1.0
    """Divides after the sum."""
    wire_dtype: torch.dtype | None = None
    """None: the gradients' own."""
    when: When = When.AT_BOUNDARY

    @property
    def num_ranks(self) -> int:
        """How many ranks' gradients are averaged."""
        return self.exchange.world_size * (self.replicas.world_size if self.replicas else 1)

    @property
    def share(self) -> float:
        """By what a value that all ranks have alike must be multiplied to come out of the reduction unchanged: 1 for means."""
        return self.predivide * self.divide_by / self.exchange.world_size

    def to_wire(self, flat: Tensor) -> Tensor:
        """The flat buffer as it travels: itself, or a copy in another dtype. Divides it in place."""
        if self.predivide != 1.0:
            flat.div_(self.predivide)
        return flat if self.wire_dtype in (None, flat.dtype) else flat.to(self.wire_dtype)

    def average_replicas(self, values: Tensor) -> None:
        """Average a reduced result with its replicas, in place, now. Collective over them."""
        if self.replicas is not None:
            self.replicas.start_all_reduce(values, divide_by=self.replicas.world_size).wait()

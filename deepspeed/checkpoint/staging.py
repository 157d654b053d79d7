"""Bounded staging memory: page-aligned blocks through which every byte of a checkpoint goes to or comes from the disk.

Owned by a save, a load, or, for asynchronous saves, by the engine for its life. The producer takes a block, fills it
and hands it to a thread that digests and writes it; with few blocks that is double buffering, with enough for a whole
shard the producer is done after a copy at memory speed and the files follow. That is the whole difference between a
synchronous and an asynchronous save.

Invariant: at most `num_blocks * BLOCK` bytes; a block belongs to one holder at a time.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import Tensor

from deepspeed.tiers.buffers import aligned_buffer

BLOCK = 4 << 20
"""Bytes of a block, and of what one digest covers: large for the disk, small beside a tensor."""

FEW = 8
"""Blocks with which a disk is kept busy, used again and again, so in the memory that is quickest for it. More are wanted by
asynchronous saves alone, for which the run waits until they are there."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One piece of staging memory, as a tensor [BLOCK] of bytes and as a buffer for system calls."""

    tensor: Tensor
    memory: memoryview


class Staging:
    """A pool of blocks, made when first needed and kept; `take` waits while all are in use."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = max(2, num_blocks)
        self._free: list[Block] = []
        self._num_made = 0
        self._condition = threading.Condition()

    def take(self) -> Block:
        """A block for the caller alone."""
        with self._condition:
            while not self._free and self._num_made >= self.num_blocks:
                self._condition.wait()
            if self._free:
                return self._free.pop()
            self._num_made += 1
            memory = aligned_buffer(BLOCK, is_huge=self._num_made <= FEW)
        return Block(memory, memory.numpy().data)

    def give_back(self, block: Block) -> None:
        """The caller is done with the block."""
        with self._condition:
            self._free.append(block)
            self._condition.notify()

    def grow(self, num_blocks: int) -> None:
        """Allow more blocks."""
        with self._condition:
            self.num_blocks = max(self.num_blocks, num_blocks)
            self._condition.notify_all()

    @property
    def nbytes(self) -> int:
        """Memory held now."""
        return self._num_made * BLOCK

"""Where the inputs of a checkpoint rest between its forward and its backward.

Called by `activation.call` through torch's saved-tensor hooks: `Saver.pack` as autograd saves an input,
`Saver.unpack` as backward asks for it. Four places, and their combinations:

    whole            the tensor itself; nothing is packed
    partitioned      [numel / ranks] on each model-parallel rank; backward all-gathers
    on the CPU       a copy in (pinned) host memory
    contiguous       a slot of one buffer [num_checkpoints * numel] per position, so that long-lived pieces do not lie
                     scattered between short-lived ones

Only activations move: floating tensors that require grad. Constants that blocks share (masks, position tables) stay one
tensor for all of them; so does everything of another dtype.

Invariant: what `unpack` returns equals, bit for bit, what `pack` got. Partitioning is collective in backward: every
model-parallel rank runs the same checkpoints in the same order, on equal inputs.
After Megatron-LM / ZeRO-R partitioned activation checkpointing (arXiv:1910.02054, section 6.1). Different: any number of
elements is divided (the last piece is padded), and slots are freed with the graph, not by a counter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.collective import all_gather_single
from deepspeed.mesh import Mesh
from deepspeed.mesh.door import tensor_coordinate
from deepspeed.utils.errors import DeepSpeedConfigError


@dataclass(frozen=True)
class ModelParallel:
    """The ranks that hold equal activations: this one's place, how many, and their group (None: this rank alone)."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of(cls, mpu: Any) -> ModelParallel:
        """Those of an `mpu`, which a script gives before there is an engine. Not collective."""
        if mpu is None:
            return cls()
        coordinate, group = tensor_coordinate(mpu)
        if coordinate is None or (coordinate.size > 1 and group is None):
            raise DeepSpeedConfigError(
                f"mpu_ is a {type(mpu).__name__} without get_model_parallel_rank, _world_size and _group.\n"
                "  Give an object with these methods, or None where there is no model parallelism."
            )
        return cls(coordinate.rank, coordinate.size, group)

    @classmethod
    def of_mesh(cls, mesh: Mesh) -> ModelParallel:
        """Those of an engine's mesh. Collective over the job, where its mpu gave no group."""
        if mesh.size("tensor") == 1:
            return cls()
        group = mesh.given.get(mesh.shape.dims("tensor")) or mesh.group("tensor", "activations")
        return cls(mesh.rank("tensor"), mesh.size("tensor"), group)


class _Key(NamedTuple):
    """What slots of one buffer have in common."""

    position: int
    numel: int
    dtype: torch.dtype
    device: torch.device


@dataclass
class Arena:
    """Buffers of `num_slots` equal slots. A slot is free again when its owner is garbage."""

    num_slots: int
    _buffers: dict[_Key, tuple[Tensor, list[int]]] = field(default_factory=dict)

    def take(self, key: _Key) -> tuple[Tensor, Callable[[Any], None]]:
        """A slot [key.numel], and a function that ties it to its owner's life."""
        if key not in self._buffers:
            buffer = torch.empty(self.num_slots * key.numel, dtype=key.dtype, device=key.device)
            self._buffers[key] = buffer, list(range(self.num_slots))[::-1]
        buffer, free = self._buffers[key]
        if not free:
            raise DeepSpeedConfigError(
                f"more than number_checkpoints = {self.num_slots} checkpoints are alive at once, each with an input of "
                f"{key.numel} elements at position {key.position}; the contiguous buffer has no place for another.\n"
                "  Set activation_checkpointing.number_checkpoints to the number of checkpoints in one forward (times the "
                "forwards that wait for their backward)."
            )
        index = free.pop()
        return buffer.narrow(0, index * key.numel, key.numel), lambda owner: _tie(owner, free, index)

    def clear(self) -> None:
        """Let the buffers go; those in use live on with their owners."""
        self._buffers.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer, _ in self._buffers.values())


def _tie(owner: Any, free: list[int], index: int) -> None:
    weakref.finalize(owner, free.append, index)


class Packed:
    """One saved input: its bytes here, and how to get the tensor back."""

    def __init__(self, piece: Tensor, like: Tensor, is_partitioned: bool) -> None:
        self.piece = piece
        self.shape, self.device = like.shape, like.device
        self.is_partitioned = is_partitioned


class Saver:
    """Packs and unpacks the inputs of one checkpoint; `is_activation[i]` says whether the i-th input may move."""

    def __init__(
        self, is_activation: Sequence[bool], *, partition: bool, in_cpu: bool, ranks: ModelParallel, arena: Arena | None
    ) -> None:
        self._is_activation = list(is_activation)
        self._partition = partition and ranks.size > 1
        self._in_cpu = in_cpu
        self._ranks = ranks
        self._arena = arena
        self._position = 0

    def pack(self, tensor: Tensor) -> Tensor | Packed:
        """What autograd keeps for the next input; inputs come in order."""
        position, self._position = self._position, self._position + 1
        if position >= len(self._is_activation) or not self._is_activation[position]:
            return tensor
        piece = tensor.detach().reshape(-1)
        if self._partition:
            piece = self._own_piece(piece)
        device = torch.device("cpu") if self._in_cpu else piece.device
        tie = None
        if self._arena is not None:
            target, tie = self._arena.take(_Key(position, piece.numel(), piece.dtype, device))
        elif self._in_cpu:
            target = torch.empty(piece.numel(), dtype=piece.dtype)
            if piece.device.type != "cpu":
                target = get_accelerator().pin_memory(target)
        else:
            target = torch.empty_like(piece)
        target.copy_(piece, non_blocking=False)
        packed = Packed(target, tensor, self._partition)
        if tie is not None:
            tie(packed)
        return packed

    def _own_piece(self, flat: Tensor) -> Tensor:
        numel = self._piece_numel(flat.numel())
        start = min(numel * self._ranks.rank, flat.numel())
        own = flat.narrow(0, start, min(numel, flat.numel() - start))
        return own if own.numel() == numel else torch.nn.functional.pad(own, (0, numel - own.numel()))

    def _piece_numel(self, numel: int) -> int:
        return -(-numel // self._ranks.size)

    def unpack(self, saved: Tensor | Packed) -> Tensor:
        """The tensor that was packed. Collective over the model-parallel ranks if it was partitioned."""
        if not isinstance(saved, Packed):
            return saved
        piece = saved.piece.to(saved.device)
        if not saved.is_partitioned:
            return piece.view(saved.shape)
        whole = torch.empty(self._ranks.size * piece.numel(), dtype=piece.dtype, device=piece.device)
        all_gather_single(whole, piece.contiguous(), group=self._ranks.group)
        return whole.narrow(0, 0, saved.shape.numel()).view(saved.shape)

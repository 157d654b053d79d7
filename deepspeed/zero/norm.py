"""One norm of a step's gradients, over every rank that holds a part of the model; an overflow shows in it.

Owned by the optimizer wrapper, asked once per step after the gradients were delivered. Every clipping factor and every
decision to skip a step follows from its answer, so the answer has the same bits on all ranks of a model.

    squares of this rank's slices        cut over "shard" (O sharded): every element lies on one rank
    of parameters with pieces elsewhere  cut over "model" (`mesh.marks`): summed over it
    of experts                           cut over "expert_shard"; summed over "experts" too, which hold different ones
    of parameters that are repeated      counted on one of the ranks that have them; the others add 0 * norm, which is nan
                                         where theirs is not finite, so that no rank's overflow goes unseen

One all-reduce of two numbers over the role "norm", or over "whole" where O is replicated; none where that is one rank.

Invariant: with the same gradients in one process, plain PyTorch's `clip_grad_norm_` gives this norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspeed.mesh import Mesh, marks
from deepspeed.utils.waits import COMMUNICATION
from deepspeed.zero.gradients import Gradients, norm_of
from deepspeed.zero.master import Master

CHANGED = 2**16
"""Added to the number of ranks that missed a gradient by one whose model was changed: both travel as one number."""


class Measured(NamedTuple):
    """What all ranks of a model know alike about a step's gradients."""

    norm: float
    """Scaled as the gradients are; inf or nan after an overflow."""
    missed_any: bool
    """Whether a parameter had no gradient on some rank."""
    changed_any: bool = False
    """Whether some rank's script changed the model, where the answer is summed over ranks (see zero.takeover)."""


class Asked(NamedTuple):
    """A norm that is on its way."""

    own: Tensor
    """[], this rank's part."""
    missed: Tensor
    """[], above 0 where a gradient was missing, as far as this rank knows."""
    both: Tensor
    """[2], what is being summed; not to be touched until `finish`."""
    work: Any


class GradientNorm:
    """Measures the gradients of one engine. `masters[i]` is the optimizer's side of `gradients[i]`.

    is_sharded: whether each rank holds a slice of the optimizer's state, and so of the gradients. Collective to make.
    """

    def __init__(
        self,
        gradients: Sequence[Gradients],
        masters: Sequence[Master],
        mesh: Mesh,
        device: torch.device,
        *,
        is_sharded: bool,
    ) -> None:
        self._gradients, self._masters, self._mesh, self._device = gradients, masters, mesh, device
        self._is_sharded = is_sharded
        # On CPUs the group of small agreements will do; a device's numbers need its own backend.
        purpose = "control" if device.type == "cpu" else "norm"
        self._group: Any = mesh.group("norm" if is_sharded else "whole", purpose)
        self._left_out: list[set[int]] = []
        """Per bucket, its parameters whose squares another rank of the model counts."""
        self.add()

    @property
    def device(self) -> torch.device:
        """Where norms are summed."""
        return self._device

    @property
    def has_replicas(self) -> bool:
        """Whether shards are repeated on other ranks."""
        return self._mesh.size("replicate") > 1

    def add(self) -> None:
        """Measure the masters too that have joined since the last call."""
        self._left_out += [self._repeated_elsewhere(master) for master in self._masters[len(self._left_out) :]]

    def _repeated_elsewhere(self, master: Master) -> set[int]:
        params = master.bucket.params
        if not self._is_sharded and master.bucket.over == "shard" and self._mesh.rank("experts") > 0:
            return set(range(len(params)))  # ranks with other experts have these whole, too
        if self._mesh.size("model") == 1:
            return set()
        shape, rank = self._mesh.shape, self._mesh.global_rank
        return {i for i, param in enumerate(params) if not marks.of(param).counts_here(shape, rank)}

    def measure(self, news: bool | Tensor = False) -> Measured:
        """Collective, once per step; again after the gradients of parameters that join. The host waits for the answer here."""
        return self.finish(self.start(news, self._group))

    def start(self, news: bool | Tensor, group: Any) -> Asked:
        """Begin to measure over `group`, which has the same ranks as this norm's own. Collective; nobody waits here."""
        missed = self._missed()  # first: it takes the flags out of the buffers that the norm reads
        if news is not False:
            missed = missed + CHANGED * news
        norms = [self._norm_of(i) for i in range(len(self._gradients))]
        total = self._together(norms)
        both = torch.stack([total, missed])
        work = None
        if group is not None:
            both[0].square_()
            work = torch.distributed.all_reduce(both, group=group, async_op=True)
        return Asked(total, missed, both, work)

    def _together(self, norms: list[Tensor]) -> Tensor:
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=self._device)

    def finish(self, asked: Asked) -> Measured:
        """Wait for the answer."""
        both = asked.both
        if asked.work is not None:
            with COMMUNICATION.during("zero.norm", both.nbytes):
                asked.work.wait()
            both[0].sqrt_()
        norm, num_missed = both.tolist()
        if self._is_sharded and self._mesh.size("replicate") > 1:
            num_missed = max(theirs for (theirs,) in self._mesh.agree("average", int(num_missed)))
        return Measured(norm, num_missed % CHANGED > 0, num_missed >= CHANGED)

    def _missed(self) -> Tensor:
        """[], above 0 if a gradient was missing on this rank, or on any where the reductions brought that along."""
        flags = [(gradients, gradients.take_missed_flag()) for gradients in self._gradients]
        told = [flag for _, flag in flags if flag is not None]
        misses_here = any(g.arrivals.misses_any for g, flag in flags if flag is None)
        if told and not misses_here:
            return torch.cat(told).float().sum()
        # Filled on the device: a tensor made of a Python number is a copy that the host waits for.
        return torch.full((), float(misses_here), device=self._device)

    def _norm_of(self, index: int) -> Tensor:
        """What one bucket adds on this rank."""
        left_out = self._left_out[index]
        if not left_out:
            return self._gradients[index].norm()
        if len(left_out) == len(self._masters[index].bucket.params):
            return self._gradients[index].norm() * 0
        master, values = self._masters[index], self._gradients[index].values()
        pieces = [
            (piece.param, values.narrow(0, piece.in_shard, piece.numel)) for piece in master.layout.pieces(master.rank)
        ]
        norms = [norm_of(values) for _, values in pieces] if pieces else []
        counted = [norm * 0 if param in left_out else norm for (param, _), norm in zip(pieces, norms, strict=True)]
        return torch.linalg.vector_norm(torch.stack(counted)) if counted else torch.zeros((), device=self._device)

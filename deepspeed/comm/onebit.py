"""An all-reduce in one bit per element: signs and one scale a tensor, with error feedback on both of its hops.

Called by the 1-bit optimizers' reductions (`zero.own_reduction`, `optim.compressed`) and by `deepspeed.runtime.comm.compressed`.
Each rank is a server for one slice of every tensor:

    worker   error_w += x;  scale = ||error_w|| / sqrt(n);  send the signs of slice r to rank r;  error_w -= scale * sign
    server   error_s += mean over ranks of scale * sign;  the same again;  send signs and scale of the slice to all
    result   every slice's scale * sign, the same bits on every rank

All tensors of a call travel together, in two messages per pair of ranks: their scales, then their bits.

    to rank r   | scale of t0, t1, ...  | bits of t0's slice r | bits of t1's slice r | ...        bytes

Invariant: equal to the same steps in one process, bit for bit; sums are made in rank order, in fp32. The padding takes part
in the errors, as zeros do. After 1-bit Adam (arXiv:2102.02888), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.collective import all_gather_single
from deepspeed.kernels.table import pick
from deepspeed.utils.waits import COMMUNICATION

SCALE_NBYTES = 4


def padded_numel(numel: int, world_size: int) -> int:
    """Elements of a tensor once every rank's slice has whole bytes of signs."""
    unit = world_size * math.lcm(world_size, 8)
    return -(-numel // unit) * unit


@final
class SignReduction:
    """The compressed mean over a process group; None is one rank."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self._group = group
        self.world_size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()

    def errors(self, numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Zero errors of a tensor of so many elements, for `average`: the worker's [padded], the server's [padded / ranks]."""
        padded = padded_numel(numel, self.world_size)
        return torch.zeros(padded, device=device), torch.zeros(padded // self.world_size, device=device)

    def average(
        self, tensors: Sequence[Tensor], worker_errors: Sequence[Tensor], server_errors: Sequence[Tensor]
    ) -> None:
        """Replace each tensor (1-D, without gaps, any float dtype) by the compressed mean over ranks; errors are carried on.

        Collective: every rank, tensors of the same lengths in the same order.
        """
        if not tensors:
            return
        works = [_as_work(tensor, len(error)) for tensor, error in zip(tensors, worker_errors, strict=True)]
        received = self._to_servers(works, worker_errors)
        answers = self._to_all(self._serve(received, server_errors), server_errors)
        for tensor, work in zip(tensors, self._decode(works, answers), strict=True):
            if work.data_ptr() != tensor.data_ptr():
                tensor.copy_(work[: tensor.numel()])

    def _to_servers(self, works: Sequence[Tensor], errors: Sequence[Tensor]) -> list[Tensor]:
        """Send every rank the signs of its slices; what came from each rank."""
        packed = [_compress(work, error) for work, error in zip(works, errors, strict=True)]
        scales = torch.stack([scale for _, scale in packed]).view(torch.uint8)
        bits = [piece.view(self.world_size, -1) for piece, _ in packed]
        message = torch.cat([scales.expand(self.world_size, -1), *bits], dim=1)
        if self._group is None:
            return list(message)
        received = torch.empty_like(message)
        with COMMUNICATION.during("zero.signs_to_servers", message.nbytes):
            dist.all_to_all_single(received, message.contiguous(), group=self._group)
        return list(received)

    def _serve(self, received: Sequence[Tensor], errors: Sequence[Tensor]) -> Tensor:
        """The mean of this rank's slices, compressed again: one message."""
        means = [torch.zeros_like(error) for error in errors]
        for message in received:
            _add_message(message, means)
        packed = []
        for mean, error in zip(means, errors, strict=True):
            packed.append(_compress(mean.div_(self.world_size), error))
        scales = torch.stack([scale for _, scale in packed]).view(torch.uint8)
        return torch.cat([scales, *(bits for bits, _ in packed)])

    def _to_all(self, message: Tensor, errors: Sequence[Tensor]) -> list[Tensor]:
        if self._group is None:
            return [message]
        answers = message.new_empty(self.world_size * len(message))
        with COMMUNICATION.during("zero.signs_to_all", answers.nbytes):
            all_gather_single(answers, message, group=self._group)
        return list(answers.view(self.world_size, -1))

    def _decode(self, works: Sequence[Tensor], answers: Sequence[Tensor]) -> Sequence[Tensor]:
        for work in works:
            work.zero_()
        for rank, message in enumerate(answers):
            _add_message(message, [work.view(self.world_size, -1)[rank] for work in works])
        return works


def _as_work(tensor: Tensor, padded: int) -> Tensor:
    """The tensor as fp32 [padded]: itself where that is what it is."""
    if tensor.dtype is torch.float32 and tensor.numel() == padded and tensor.is_contiguous():
        return tensor.view(-1)
    work = torch.zeros(padded, device=tensor.device)
    work[: tensor.numel()].copy_(tensor.view(-1))
    return work


def _compress(x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    bits, scale = pick("compress_signs", x.device.type)(x, error)
    return bits, scale.view(1)[0]


def _add_message(message: Tensor, into: Sequence[Tensor]) -> None:
    """into[i] += scale * sign of a message's i-th tensor."""
    at = SCALE_NBYTES * len(into)
    scales = message[:at].clone().view(torch.float32)
    for scale, target in zip(scales, into, strict=True):
        nbytes = target.numel() // 8
        pick("add_signs", message.device.type)(message[at : at + nbytes].contiguous(), target, scale)
        at += nbytes

"""Gathers and reductions that carry int8 and int4 instead of the buffer's own dtype (ZeRO++'s qwZ and qgZ).

`QuantizedGather` wraps another exchange, `QuantizedReduction` is one for gradients; gathers
are chosen in `zero/gather_exchanges.py`, reductions in `assembly/exchanges.py`.
A tensor travels as one message, by `comm.code`: scales of its groups, then their integers.

    all-gather       int8: every rank's slice, quantised by its owner, dequantised by all. The owner too computes with what the
                     others got, so that all ranks have the same weights.
    reduce-scatter   int4 in two hops, where ranks are far x near (a node's):
                     near   rank l gets, of every rank of its node, the slices of all ranks with number l on their nodes; adds
                     far    rank n gets of those what is its own; adds

Note [The second hop]
    A far message can be made only when all near ones have come. Nobody may block for it before the wait: at stage 3 another
    rank may need a gather from us first. So reductions queue up; whenever one is started, asked whether it is done, or waited
    for, the ones at the head whose first hop has ended start their second. That order is the order of launching, the same on
    every rank, which is what a process group needs.

Invariant: sums are made in fp32, in rank order within a hop, so results do not depend on timing. What is not finite makes its
group's scale so, and its whole group comes back as nan.

After ZeRO++ (arXiv:2306.10209), sections 4.1 and 4.3; error feedback after LoCo (arXiv:2407.04480).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from deepspeed.comm.code import GRADIENTS, WEIGHTS, Code
from deepspeed.comm.exchange import Exchange, OwnGathers, Pending, slices_of
from deepspeed.comm.feedback import ErrorFeedback
from deepspeed.kernels.reference.sums import deliver
from deepspeed.utils.waits import COMMUNICATION


@final
class QuantizedGather(OwnGathers):
    """Another exchange, whose all-gathers carry `code`. They leave dequantised values in the own slice too."""

    def __init__(self, inner: Exchange, code: Code = WEIGHTS) -> None:
        super().__init__(inner)
        self._code = code

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        slices = slices_of(full, self.world_size)
        message = self._code.encode(slices[self.rank] if shard is None else shard)
        messages = message.new_empty(self.world_size * message.numel())
        gather = self._inner.start_all_gather(messages, message)

        def finish() -> None:
            gather.wait()
            for target, received in zip(slices, slices_of(messages, self.world_size), strict=True):
                target.copy_(self._code.decode(received, target.numel(), full.dtype))

        return Pending(finish)


@dataclass(frozen=True, eq=False)
class Hops:
    """The groups of two-hop reductions; None where this rank is alone in one. Near ranks are consecutive.

    `waiting` are the reductions whose second hop is to start, in order: one queue for all that use these groups.
    """

    near: ProcessGroup | None
    far: ProcessGroup | None
    waiting: deque[_Reducing] = field(default_factory=deque)

    @property
    def num_near(self) -> int:
        """Ranks of a node."""
        return 1 if self.near is None else self.near.size()

    @property
    def num_far(self) -> int:
        """Nodes."""
        return 1 if self.far is None else self.far.size()

    def advance(self) -> None:
        """Start the second hops that can be."""
        while self.waiting and self.waiting[0].first_is_done:
            self.waiting.popleft().start_second()


Encode = Callable[[Tensor], Tensor]


class _Reducing:
    """One reduction on its way; see Note [The second hop]."""

    def __init__(self, owner: QuantizedReduction, first: Any, received: Tensor, numel: int) -> None:
        self._owner, self._first, self._received, self._numel = owner, first, received, numel
        self._second: Any = None
        self._result: Tensor | None = None

    @property
    def first_is_done(self) -> bool:
        """Whether all near messages have come."""
        return self._first is None or bool(self._first.is_completed())

    def start_second(self) -> None:
        """Add up the first hop, waiting for it, and send its sums."""
        if self._first is not None:
            self._first.wait()
        sums = self._owner.add_up(self._received, self._numel * self._owner.hops.num_far, self._owner.hops.num_near)
        if self._owner.hops.far is None:
            self._result = sums
            return
        self._received, self._second = self._owner.send_far(sums, self._numel)

    def is_completed(self) -> bool:
        """Asked by whoever wants to know whether waiting would wait."""
        self._owner.hops.advance()
        return self._result is not None or (self._second is not None and bool(self._second.is_completed()))

    def result(self) -> Tensor:
        """[numel] fp32, the sum over all ranks. The second hop has been started."""
        if self._result is None:
            self._second.wait()
            self._result = self._owner.add_up(self._received, self._numel, self._owner.hops.num_far)
        return self._result


@final
class QuantizedReduction:
    """The exchange of gradients: reduce-scatters by `hops` in `code`, everything else by `inner`.

    feedback: makes what a hop's error is kept by, for buffers whose messages are always of the same parameters; then the
    exchange belongs to one bucket.
    """

    needs_shard = True

    def __init__(
        self,
        inner: Exchange,
        hops: Hops,
        code: Code = GRADIENTS,
        feedback: Callable[[], ErrorFeedback] | None = None,
    ) -> None:
        assert hops.num_near * hops.num_far == inner.world_size, "near x far ranks are all ranks"
        self._inner, self.hops, self._code = inner, hops, code
        self.group, self.rank, self.world_size = inner.group, inner.rank, inner.world_size
        self.feedback: list[ErrorFeedback] = []
        """What is kept of each message of the near hop, then of the far one; nothing without feedback."""
        self._encode_near = [self._encoder(feedback) for _ in range(hops.num_near)]
        self._encode_far = [self._encoder(feedback) for _ in range(hops.num_far)]

    def _encoder(self, feedback: Callable[[], ErrorFeedback] | None) -> Encode:
        if feedback is None:
            return self._code.encode
        kept = feedback()
        self.feedback.append(kept)
        return lambda x: kept.encode(x, self._code)

    def invalidate(self) -> None:
        """See Exchange. Nothing is kept."""

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        """See Exchange."""
        return self._inner.start_all_gather(full, shard)

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        """See Exchange."""
        return self._inner.start_all_reduce(full, divide_by)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange."""
        self._inner.broadcast(full, source)

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        """See Exchange."""
        numel = full.numel() // self.world_size
        by_place = full.view(self.hops.num_far, self.hops.num_near, numel)
        messages = [encode(by_place[:, place].reshape(-1)) for place, encode in enumerate(self._encode_near)]
        received, work = _exchange(messages, self.hops.near, "zero.quantized_near")
        reducing = _Reducing(self, work, received, numel)
        waiting = self.hops.waiting
        waiting.append(reducing)
        self.hops.advance()

        def finish() -> None:
            while reducing in waiting:
                waiting.popleft().start_second()
            deliver(reducing.result(), out, divide_by, accumulate)

        return Pending(finish, reducing)

    def add_up(self, received: Tensor, numel: int, num_ranks: int) -> Tensor:
        """[numel] fp32, the sum of one hop's messages, in rank order."""
        first, *others = received.view(num_ranks, -1)
        total = self._code.decode(first, numel)
        for message in others:
            total.add_(self._code.decode(message, numel))
        return total

    def send_far(self, sums: Tensor, numel: int) -> tuple[Tensor, Any]:
        """Start the second hop of [far * numel]."""
        pieces = sums.view(self.hops.num_far, numel)
        messages = [encode(piece) for piece, encode in zip(pieces, self._encode_far, strict=True)]
        return _exchange(messages, self.hops.far, "zero.quantized_far")


def _exchange(messages: list[Tensor], group: ProcessGroup | None, op: str) -> tuple[Tensor, Any]:
    """Start sending messages[rank] to every rank; what will come from each, and the work, None where it is there."""
    sent = torch.cat(messages)
    if group is None:
        return sent, None
    received = torch.empty_like(sent)
    work = dist.all_to_all_single(received, sent, group=group, async_op=True)
    COMMUNICATION.add(0.0, op, sent.nbytes)
    return received, _Kept(work, sent)


class _Kept:
    """A work with the buffer that it reads."""

    def __init__(self, work: Any, sent: Tensor) -> None:
        self._work = work
        self._sent: Tensor | None = sent

    def is_completed(self) -> bool:
        """Of the work."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """For the work; then the buffer may go."""
        self._work.wait()
        self._sent = None

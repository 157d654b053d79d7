"""Ring attention, and its composition with Ulysses where more ranks share a sequence than there are key heads.

Called by the attention of Hugging Face models. P ranks are U x R: the exchange gives rank (g, u) the heads of u, of U, and two
chunks of the sequence of 2 R, number g and number 2R-1-g; then keys and values go round the R ranks of the same heads, and each
rank attends to what comes by. Early and late chunks together make every rank's work under causal order the same (zig-zag):

    R = 2      rank g = 0: chunks 0, 3        rank g = 1: chunks 1, 2

U is the largest divisor of P up to the number of key heads, so no key head is sent to more than one of the U. One exchange
there and one back, as in plain Ulysses; the ring's messages overlap with the blocks' products.

In backward the gradients of keys and values travel on with them, and are home after R steps. A chunk sees another one by their
numbers: earlier ones whole, itself in causal order, later ones not at all.

Sources: ring attention (arXiv:2310.01889), zig-zag order (arXiv:2311.09431), Ulysses x ring (arXiv:2405.07719).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.recorder import watched
from deepspeed.parallel.sequence import block
from deepspeed.parallel.sequence.documents import Documents
from deepspeed.parallel.sequence.heads import Heads, Range, deal, share_heads

Group = Any


@dataclass(frozen=True)
class RingPlan:
    """Who has which heads and which chunks. `heads`: of all P ranks. `chunks`: ranges of the whole sequence of every rank."""

    num_heads_ranks: int
    heads: Heads
    chunks: tuple[tuple[Range, ...], ...]
    rank: int

    @property
    def num_steps(self) -> int:
        """How many ranks share the same heads."""
        return len(self.chunks) // self.num_heads_ranks

    def at(self, step: int) -> int:
        """The rank whose keys and values are here after some steps."""
        u, g = self.rank % self.num_heads_ranks, self.rank // self.num_heads_ranks
        return (g - step) % self.num_steps * self.num_heads_ranks + u

    def length_at(self, step: int) -> int:
        """Of the keys that are here after some steps."""
        return sum(end - start for start, end in self.chunks[self.at(step)])

    def neighbours(self) -> tuple[int, int]:
        """(to whom this rank sends, from whom it receives)."""
        return self.at(-1), self.at(1)


def plan_ring(num_query: int, num_key: int, length: int, num_ranks: int, rank: int) -> RingPlan:
    """The plan of one rank. Pure."""
    num_heads_ranks = max(u for u in range(1, num_ranks + 1) if num_ranks % u == 0 and u <= num_key)
    num_steps = num_ranks // num_heads_ranks
    few = share_heads(num_query, num_key, num_heads_ranks)
    parts = deal(length, 2 * num_steps)
    own = [rank % num_heads_ranks for rank in range(num_ranks)]
    heads = Heads(num_query, num_key, tuple(few.query[u] for u in own), tuple(few.key[u] for u in own))
    groups = [rank // num_heads_ranks for rank in range(num_ranks)]
    return RingPlan(num_heads_ranks, heads, tuple((parts[g], parts[-1 - g]) for g in groups), rank)


@dataclass(frozen=True)
class _Seen:
    """What masks a block."""

    is_causal: bool
    window: int | None
    documents: Documents
    ids: Tensor | None
    """[b, whole sequence] of documents, where there are several."""

    def mask(self, query: Range, key: Range, device: torch.device) -> block.Mask | None:
        """Of a chunk of queries to a chunk of keys; None where nothing is seen."""
        if query[0] == query[1] or key[0] == key[1]:
            return None
        if self.is_causal and key[0] > query[0]:
            return None
        if self.window is not None and self.is_causal and query[0] - (key[1] - 1) >= self.window:
            return None
        visible = self.documents.visible
        return block.Mask(
            torch.arange(*query, device=device),
            torch.arange(*key, device=device),
            self.is_causal and key[1] > query[0],
            None if self.ids is None else (self.ids[:, query[0] : query[1]], self.ids[:, key[0] : key[1]]),
            self.window,
            None if visible is None else visible[:, key[0] : key[1]],
        )


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RingPlan,
    group: Group,
    documents: Documents,
    *,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """query, key, value: [b, own heads, own chunks, d]; the output the same. Collective; differentiable."""
    needs_ids = documents.visible is None and not documents.are_whole_rows
    seen = _Seen(is_causal, window, documents, documents.ids(query.device) if needs_ids else None)
    found = _Ring.apply(query, key, value, plan, group, seen, query.shape[-1] ** -0.5 if scale is None else scale)
    assert isinstance(found, Tensor), "one output"
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: RingPlan, group: Group, seen: _Seen, scale: float
    ) -> Tensor:
        own = plan.chunks[plan.rank]
        joined = [block.Joined() for _ in own]
        queries = _split(query, own)
        here: list[Tensor] = [key.contiguous(), value.contiguous()]
        for step in range(plan.num_steps):
            moving = _send_on(here, plan, group, plan.length_at(step + 1)) if step < plan.num_steps - 1 else None
            theirs = plan.chunks[plan.at(step)]
            keys, values = _split(here[0], theirs), _split(here[1], theirs)
            for i, q_range in enumerate(own):
                for j, k_range in enumerate(theirs):
                    mask = seen.mask(q_range, k_range, query.device)
                    if mask is not None:
                        joined[i].add(*block.forward(queries[i], keys[j], values[j], scale, mask))
            here = moving.wait() if moving is not None else here
        parts = [_or_empty(each, q, value) for each, q in zip(joined, queries, strict=True)]
        output = torch.cat([out for out, _ in parts], 2).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, torch.cat([lse for _, lse in parts], 2))
        ctx.plan, ctx.group, ctx.seen, ctx.scale = plan, group, seen, scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        plan: RingPlan = ctx.plan
        own = plan.chunks[plan.rank]
        queries, outs, sums, outer = (_split(t, own) for t in (query, output, lse, grads[0]))
        grad_query = [torch.zeros_like(q, dtype=lse.dtype) for q in queries]
        here = [key.contiguous(), value.contiguous()]
        there = [torch.zeros_like(t, dtype=lse.dtype) for t in here]
        for step in range(plan.num_steps):
            moving = _send_on(here, plan, ctx.group, plan.length_at(step + 1)) if step < plan.num_steps - 1 else None
            theirs = plan.chunks[plan.at(step)]
            keys, values = _split(here[0], theirs), _split(here[1], theirs)
            grad_keys, grad_values = _split(there[0], theirs), _split(there[1], theirs)
            for i, q_range in enumerate(own):
                for j, k_range in enumerate(theirs):
                    mask = ctx.seen.mask(q_range, k_range, query.device)
                    if mask is None:
                        continue
                    found = block.backward(
                        outer[i], queries[i], keys[j], values[j], outs[i], sums[i].contiguous(), ctx.scale, mask
                    )
                    for target, grad in zip((grad_query[i], grad_keys[j], grad_values[j]), found, strict=True):
                        target += grad
            here = moving.wait() if moving is not None else here
            if plan.num_steps > 1:
                there = _send_on(there, plan, ctx.group, plan.length_at(step + 1)).wait()
        grad_q = torch.cat(grad_query, 2).to(query.dtype)
        return grad_q, there[0].to(key.dtype), there[1].to(value.dtype), None, None, None, None


def _or_empty(joined: block.Joined, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk's output and sum; zeros where it saw nothing."""
    if joined.output is not None and joined.lse is not None:
        return joined.output, joined.lse
    shape = query.shape[:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_zeros(*shape, value.shape[-1], dtype=wide), query.new_full(shape, -torch.inf, dtype=wide)


def _split(tensor: Tensor, ranges: Sequence[Range]) -> list[Tensor]:
    return list(tensor.split([end - start for start, end in ranges], dim=2))


class _Moving:
    """Tensors on their way round the ring."""

    def __init__(self, works: list[Any], sent: list[Tensor], received: list[Tensor], num_ranks: int) -> None:
        self._works, self._sent, self._received = works, sent, received  # what is sent stays until it has left
        self._num_ranks = num_ranks

    def wait(self) -> list[Tensor]:
        """What the neighbour had."""
        with watched("sequence.ring", sum(tensor.nbytes for tensor in self._sent), self._num_ranks):
            for work in self._works:
                work.wait()
        return self._received


def _send_on(tensors: list[Tensor], plan: RingPlan, group: Group, length: int) -> _Moving:
    """Start sending tensors to the next rank of the ring, and receiving the previous one's, of another length."""
    to, source = plan.neighbours()
    received, operations = [], []
    for tensor in tensors:
        incoming = tensor.new_empty(*tensor.shape[:2], length, tensor.shape[3])
        received.append(incoming)
        operations.append(dist.P2POp(dist.isend, tensor, group=group, group_peer=to))
        operations.append(dist.P2POp(dist.irecv, incoming, group=group, group_peer=source))
    return _Moving(dist.batch_isend_irecv(operations), tensors, received, plan.num_steps)

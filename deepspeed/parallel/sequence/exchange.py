"""The all-to-all of sequence parallelism: from a part of the sequence with all heads to all of it with a part of the heads.

Used by the attention layers; uses torch.distributed's `all_to_all_single` alone. Query, key and value travel in one message
per pair of ranks, so that a layer has two collectives forward (there, and the output back) and two backward.

    rank r   [.., s_r, .., h, ..]   --to_heads-->   [.., s, .., h_r, ..]        s = sum of all s_r
                                    <--to_sequence--

Both are autograd functions, and each is the other's backward. Where several ranks have one key head (fewer key heads than
ranks), the way back adds their parts up: that is what the gradient of a copy is.

Invariant: every rank of the group calls with the same heads and lengths; only the own length of the tensors differs.
After DeepSpeed-Ulysses (arXiv:2309.14509), which exchanges query, key and value one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepspeed.comm.recorder import watched
from deepspeed.parallel.sequence.heads import Heads, Range

Group = Any


@dataclass(frozen=True, slots=True)
class Layout:
    """How the sequence is spread over the ranks of a group before and after, and which dimensions of a tensor are which.

    lengths: of every rank's part of the sequence, in order. owned: ranges of the whole sequence that each rank has after
    `to_heads`, in the order in which it has them; () for all of it on every rank.
    """

    lengths: tuple[int, ...]
    seq_dim: int
    head_dim: int
    rank: int
    owned: tuple[tuple[Range, ...], ...] = ()

    def ranges_of(self, rank: int) -> tuple[Range, ...]:
        """What a rank has after `to_heads`."""
        return self.owned[rank] if self.owned else ((0, sum(self.lengths)),)

    @property
    def own_length(self) -> int:
        """How much of the sequence this rank has after `to_heads`."""
        return sum(end - start for start, end in self.ranges_of(self.rank))

    def overlaps(self, source: int, target: int) -> list[tuple[int, int, int]]:
        """(place in the source's part, place in what the target has, length) of everything that the one sends the other."""
        first = sum(self.lengths[:source])
        last, offset, found = first + self.lengths[source], 0, []
        for start, end in self.ranges_of(target):
            low, high = max(first, start), min(last, end)
            if low < high:
                found.append((low - first, offset + low - start, high - low))
            offset += end - start
        return found


def qkv_ranges(heads: Heads) -> tuple[tuple[Range, ...], ...]:
    """The ranges of query, key and value heads."""
    return heads.query, heads.key, heads.key


def to_heads(
    tensors: Sequence[Tensor], ranges: Sequence[tuple[Range, ...]], layout: Layout, group: Group
) -> tuple[Tensor, ...]:
    """The whole sequence with this rank's heads, for each tensor, in one exchange. Collective; differentiable."""
    return tuple(_ToHeads.apply(tuple(ranges), layout, group, *tensors))


def to_sequence(
    tensors: Sequence[Tensor], ranges: Sequence[tuple[Range, ...]], layout: Layout, group: Group
) -> tuple[Tensor, ...]:
    """This rank's part of the sequence with all heads: the way back. Collective; differentiable."""
    return tuple(_ToSequence.apply(tuple(ranges), layout, group, *tensors))


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranges: Any, layout: Layout, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.layout, ctx.group = ranges, layout, group
        return _scatter_heads(tensors, ranges, layout, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_scatter_sequence(grads, ctx.ranges, ctx.layout, ctx.group)


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranges: Any, layout: Layout, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.layout, ctx.group = ranges, layout, group
        return _scatter_sequence(tensors, ranges, layout, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *_scatter_heads(grads, ctx.ranges, ctx.layout, ctx.group)


def _scatter_heads(
    tensors: Sequence[Tensor], ranges: Sequence[tuple[Range, ...]], layout: Layout, group: Group
) -> tuple[Tensor, ...]:
    """To each rank its heads of the own part; from each rank the own heads of its part."""
    ranks = range(len(layout.lengths))
    sent = [
        [
            t.narrow(layout.head_dim, of[rank][0], of[rank][1] - of[rank][0]).narrow(layout.seq_dim, start, length)
            for start, _, length in layout.overlaps(layout.rank, rank)
            for t, of in zip(tensors, ranges, strict=True)
        ]
        for rank in ranks
    ]
    own = [of[layout.rank][1] - of[layout.rank][0] for of in ranges]
    outs = [
        tensor.new_empty(_resized(tensor, {layout.seq_dim: layout.own_length, layout.head_dim: count}))
        for tensor, count in zip(tensors, own, strict=True)
    ]
    into = [
        [out.narrow(layout.seq_dim, at, length) for _, at, length in layout.overlaps(rank, layout.rank) for out in outs]
        for rank in ranks
    ]
    for received, target in zip(_exchange(sent, into, group), into, strict=True):
        for piece, view in zip(received, target, strict=True):
            view.copy_(piece)
    return tuple(outs)


def _scatter_sequence(
    tensors: Sequence[Tensor], ranges: Sequence[tuple[Range, ...]], layout: Layout, group: Group
) -> tuple[Tensor, ...]:
    """To each rank the own heads of its part; from each rank its heads of the own part. Heads of several ranks add up."""
    ranks = range(len(layout.lengths))
    sent = [
        [t.narrow(layout.seq_dim, at, length) for _, at, length in layout.overlaps(rank, layout.rank) for t in tensors]
        for rank in ranks
    ]
    outs, shared = [], []
    for tensor, of in zip(tensors, ranges, strict=True):
        # Ranks with the same heads have other parts of the sequence, unless each has all of it.
        is_shared = not layout.owned and any(b[0] < a[1] for a, b in itertools.pairwise(of))
        shape = _resized(
            tensor, {layout.seq_dim: layout.lengths[layout.rank], layout.head_dim: max(end for _, end in of)}
        )
        outs.append(tensor.new_zeros(shape) if is_shared else tensor.new_empty(shape))
        shared.append(is_shared)
    into = [
        [
            out.narrow(layout.head_dim, of[rank][0], of[rank][1] - of[rank][0]).narrow(layout.seq_dim, start, length)
            for start, _, length in layout.overlaps(layout.rank, rank)
            for out, of in zip(outs, ranges, strict=True)
        ]
        for rank in ranks
    ]
    for received, target in zip(_exchange(sent, into, group), into, strict=True):
        for i, (piece, view) in enumerate(zip(received, target, strict=True)):
            _ = view.add_(piece) if shared[i % len(outs)] else view.copy_(piece)
    return tuple(outs)


def _exchange(sent: list[list[Tensor]], into: list[list[Tensor]], group: Group) -> list[list[Tensor]]:
    """One message to each rank with all of its pieces; what came, in the shapes of `into`."""
    first = next(piece for pieces in (*sent, *into) for piece in pieces)
    out_sizes = [sum(piece.numel() for piece in pieces) for pieces in sent]
    in_sizes = [sum(piece.numel() for piece in pieces) for pieces in into]
    outgoing = first.new_empty(sum(out_sizes))
    offset = 0
    for pieces in sent:
        for piece in pieces:
            outgoing.narrow(0, offset, piece.numel()).view(piece.shape).copy_(piece)
            offset += piece.numel()
    incoming = first.new_empty(sum(in_sizes))
    nbytes = first.element_size()  # bytes travel in every dtype; gloo refuses some
    with watched("sequence.all_to_all", outgoing.nbytes, len(sent)):
        dist.all_to_all_single(
            incoming.view(torch.uint8),
            outgoing.view(torch.uint8),
            output_split_sizes=[size * nbytes for size in in_sizes],
            input_split_sizes=[size * nbytes for size in out_sizes],
            group=group,
        )
    received: list[list[Tensor]] = []
    offset = 0
    for pieces in into:
        received.append([])
        for piece in pieces:
            received[-1].append(incoming.narrow(0, offset, piece.numel()).view(piece.shape))
            offset += piece.numel()
    return received


def _resized(tensor: Tensor, sizes: dict[int, int]) -> list[int]:
    shape = list(tensor.shape)
    for dim, size in sizes.items():
        shape[dim] = size
    return shape


def layout_of(
    group: Group, lengths: Sequence[int], seq_dim: int, head_dim: int, owned: tuple[tuple[Range, ...], ...] = ()
) -> Layout:
    """The layout of a group's ranks, of which this is one."""
    return Layout(tuple(lengths), seq_dim, head_dim, dist.get_rank(group), owned)

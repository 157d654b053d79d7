"""`DistributedAttention`: any attention over a sequence that is spread over ranks (Ulysses).

The public layer of `deepspeed.sequence.layer`, and the functions of that module which scripts call themselves. On each side of
the local attention stands one exchange (`exchange.py`): query, key and value go out together, the output comes back.

    q, k, v [s/P, b, h, d]  ->  [s, b, h/P, d]  ->  local attention  ->  [s, b, h/P, d]  ->  [s/P, b, h, d]

Heads that do not divide are dealt as `heads.py` says; fewer key heads than ranks travel to every rank that reads them. Parts of
the sequence may differ in length; then `sequence_lengths=` tells them, because asking would be a third collective.

After DeepSpeed-Ulysses (arXiv:2309.14509); names and layouts are the public contract of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.parallel.sequence.exchange import layout_of, qkv_ranges, to_heads, to_sequence
from deepspeed.parallel.sequence.heads import Heads, share_heads
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.logging import warn_once

Group = Any


class DistributedAttention(nn.Module):
    """`local_attention(query, key, value, *args, **kwargs)` over all of a sequence whose parts are on the ranks of a group.

    scatter_idx: the dimension of heads. gather_idx: that of the sequence; 0 with batch_dim_idx 1, 1 with batch_dim_idx 0.
    num_kv_heads: default that of `key`. The output has the layout of `query`; one of three dimensions has heads and their
    width in the last. sp_stream: taken and not needed: one exchange has nothing to overlap with.
    """

    def __init__(
        self,
        local_attention: Callable[..., Any],
        sequence_process_group: Group,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.local_attn = local_attention
        self.spg = sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx
        self.sp_stream = sp_stream
        self.num_kv_heads = num_kv_heads
        if sp_stream is not None:
            warn_once("DistributedAttention(sp_stream=...) has no effect: query, key and value travel in one exchange.")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int,
        rotary_pos_emb: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        sequence_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The attention's output for this rank's part, laid out as `query`. Collective.

        rotary_pos_emb: (cos, sin) of the whole sequence, applied to query and key after the exchange. sequence_lengths: of
        every rank's part, where they differ. Raises DeepSpeedError where heads cannot be split or layouts contradict.
        """
        if batch_dim_idx not in (0, 1) or batch_dim_idx == self.gather_idx:
            raise DeepSpeedError(
                f"DistributedAttention: batch_dim_idx = {batch_dim_idx} with gather_idx = {self.gather_idx}: the batch and the "
                "sequence are the first two dimensions, in either order.\n  Use (batch_dim_idx 1, gather_idx 0) for "
                "[s, b, h, d], or (0, 1) for [b, s, h, d]."
            )
        num_ranks = dist.get_world_size(self.spg)
        num_key = key.shape[self.scatter_idx]
        if self.num_kv_heads not in (None, num_key):
            raise DeepSpeedError(
                f"DistributedAttention(num_kv_heads={self.num_kv_heads}), but key has {num_key} heads: {tuple(key.shape)}."
            )
        heads = share_heads(query.shape[self.scatter_idx], num_key, num_ranks)
        lengths = tuple(sequence_lengths or [query.shape[self.gather_idx]] * num_ranks)
        layout = layout_of(self.spg, lengths, self.gather_idx, self.scatter_idx)
        if lengths[layout.rank] != query.shape[self.gather_idx]:
            raise DeepSpeedError(
                f"sequence_lengths = {list(lengths)}, but rank {layout.rank} of the group has {query.shape[self.gather_idx]}."
            )
        query, key, value = to_heads((query, key, value), qkv_ranges(heads), layout, self.spg)
        if rotary_pos_emb is not None:
            query, key = (apply_rotary_pos_emb(t, *rotary_pos_emb) for t in (query, key))
        key, value = (expanded(t, heads, layout.rank, self.scatter_idx) for t in (key, value))
        context = self.local_attn(query, key, value, *args, **kwargs)
        num_own, is_flat = query.shape[self.scatter_idx], context.dim() == 3
        if is_flat:
            context = context.unflatten(-1, (num_own, -1))
        (output,) = to_sequence((context,), (heads.query,), layout, self.spg)
        return output.flatten(-2) if is_flat else output


def expanded(tensor: Tensor, heads: Heads, rank: int, head_dim: int) -> Tensor:
    """Key or value with a head for each query head, where the rank's groups are not equal."""
    reads = heads.expand(rank)
    return tensor if reads is None else tensor.index_select(head_dim, torch.tensor(reads, device=tensor.device))


def apply_rotary_pos_emb(t: Tensor, freqs_cos: Tensor, freqs_sin: Tensor) -> Tensor:
    """Rotate the first `freqs_cos.shape[-1]` elements of the last dimension, halves against each other; the rest passes."""
    rotated, rest = t.split([freqs_cos.shape[-1], t.shape[-1] - freqs_cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * freqs_cos + turned * freqs_sin, rest), dim=-1).to(t.dtype)


def single_all_to_all(
    input: Tensor,
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    group: Group,
    async_op: bool = False,
    handle: Any = None,
    type: Any = None,
    num_kv_heads: int | None = None,
) -> Tensor:
    """One tensor from parts of the dimension `gather_idx` to parts of `scatter_idx`. Collective; differentiable.

    With `scatter_idx` 2 the heads are scattered, else the sequence. num_kv_heads: heads are dealt in groups of
    key heads, evenly without. `async_op`, `handle` and `type` are taken: the call returns when the tensor is there.
    """
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    scatters_heads = scatter_idx >= 2
    head_dim, seq_dim = (scatter_idx, gather_idx) if scatters_heads else (gather_idx, scatter_idx)
    num_heads = input.shape[head_dim] * (1 if scatters_heads else num_ranks)
    if num_kv_heads is not None and not scatters_heads:
        own_keys = share_heads(num_kv_heads, num_kv_heads, num_ranks).query[rank]
        num_heads = input.shape[head_dim] // (own_keys[1] - own_keys[0]) * num_kv_heads
    heads = share_heads(num_heads, num_kv_heads or num_heads, num_ranks)
    if not scatters_heads and input.shape[seq_dim] % num_ranks:
        raise DeepSpeedError(
            f"a sequence of {input.shape[seq_dim]} (dimension {seq_dim} of {tuple(input.shape)}) does not divide by the "
            f"{num_ranks} sequence-parallel ranks."
        )
    length = input.shape[seq_dim] // (1 if scatters_heads else num_ranks)
    layout = layout_of(group, [length] * num_ranks, seq_dim, head_dim)
    move = to_heads if scatters_heads else to_sequence
    return move((input,), (heads.query,), layout, group)[0]


class _SeqAllToAll:
    """The original's name of the differentiable exchange of one tensor."""

    @staticmethod
    def apply(
        group: Group,
        input: Tensor,
        scatter_idx: int,
        gather_idx: int,
        batch_dim_idx: int,
        stream: Any = None,
        handle: Any = None,
        type: Any = None,
        is_fwd: bool = True,
    ) -> Tensor:
        """As `single_all_to_all`."""
        return single_all_to_all(input, scatter_idx, gather_idx, batch_dim_idx, group)

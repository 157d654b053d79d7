"""FPDT, "Ulysses-Offload": attention and the layers around it chunk by chunk, for Megatron-style code: `sequence.fpdt_layer`.

Chunks are cut so that chunk i of all ranks together is the i-th piece of the sequence, in order (`FPDT_InputConstruct`): each
rank's i-th chunk is then the same piece of work. Attention takes one chunk at a time: project, exchange heads, attend to the
pieces seen so far, exchange back. Keys and values of pieces rest, on devices in main memory where offloading is on, until a
later piece or the backward asks for them. Nothing of the whole sequence but hidden states is on the device.

    FPDT_Attention         projections, attention and output of a layer
    FPDT_FFN               w2 gelu(w1 x + b1) + b2, in tiles
    FPDT_LogitsLoss        losses of tokens, in tiles of logits
    FPDT_InputConstruct    the order of tokens that balances the work

Tensors are [sequence, batch, ...], as in Megatron-LM. After FPDT (arXiv:2408.16978); names and arguments are the public contract.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.sequence import block
from deepspeed.parallel.sequence.attention import apply_rotary_pos_emb
from deepspeed.parallel.sequence.cross_entropy import TokenLosses, _JoinedSequence
from deepspeed.parallel.sequence.exchange import layout_of, qkv_ranges, to_heads, to_sequence
from deepspeed.parallel.sequence.heads import share_heads
from deepspeed.parallel.sequence.tiled import Concatenated, tile_bounds, tiled
from deepspeed.tiers import CopyStream
from deepspeed.tiers.rest import Ordered
from deepspeed.utils.errors import DeepSpeedError

Group = Any


class FPDT_InputConstruct:  # noqa: N801 - the public name
    """This rank's tokens of a batch, chunk by chunk. Batches are [batch, sequence]; `args` has
    `ds_sequence_parallel_fpdt_chunk_size`, in tokens of all ranks together."""

    def __init__(
        self,
        tokens: Tensor,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        args: Any,
        sp_size: int,
        sp_rank: int,
    ) -> None:
        self.tokens, self.labels, self.loss_mask = tokens, labels, loss_mask
        self.attention_mask, self.position_ids = attention_mask, position_ids
        self.sp_size, self.sp_rank = sp_size, sp_rank
        length, size = tokens.shape[1], args.ds_sequence_parallel_fpdt_chunk_size
        if size % sp_size or length % size:
            raise DeepSpeedError(
                f"FPDT: a sequence of {length} tokens in chunks of {size} over {sp_size} ranks: the chunk size divides the sequence, "
                "and the number of ranks divides the chunk size."
            )
        self.num_chunk_per_gpu = length // size
        self.chunk_size = size // sp_size

    def generate(self) -> tuple[Tensor | None, ...]:
        """(tokens, labels, loss_mask, attention_mask, position_ids), of the pieces of the sequence this rank's part of each."""
        starts = [
            i * self.chunk_size * self.sp_size + self.sp_rank * self.chunk_size for i in range(self.num_chunk_per_gpu)
        ]
        index = torch.cat([torch.arange(start, start + self.chunk_size) for start in starts]).to(self.tokens.device)

        def own(tensor: Tensor | None) -> Tensor | None:
            is_cut = tensor is not None and tensor.dim() == 2 and tensor.shape[1] == self.tokens.shape[1]
            return tensor.index_select(1, index) if is_cut and tensor is not None else tensor

        return (
            own(self.tokens), own(self.labels), own(self.loss_mask), self.attention_mask, own(self.position_ids),
        )  # fmt: skip


class FPDT_FFN:  # noqa: N801 - the public name
    """An MLP with GELU, a chunk at a time."""

    @staticmethod
    def apply(
        x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, add_bias: bool, chunk_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """x: [s, b, h]. (output, None) with the last bias added, or (output, b2) without."""
        bounds = tile_bounds(x.shape[0], -(-x.shape[0] // chunk_size))

        def run(_: int, tile: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(tile, w1, b1)), w2, b2 if add_bias else None)

        params = [p for p in (w1, b1, w2, b2 if add_bias else None) if p is not None and p.requires_grad]
        return tiled(run, Concatenated(0, bounds), bounds, 0, x, params), None if add_bias else b2


class FPDT_LogitsLoss:  # noqa: N801 - the public name
    """The losses of a sequence's tokens, whose logits never exist as a whole."""

    @staticmethod
    def apply(
        lm_output: Tensor, labels: Tensor, logit_weights: Tensor, rank: int, spg_size: int, spg: Group, num_chunk: int
    ) -> Tensor:
        """lm_output: [s/P, b, h]; labels: [b, s/P]; logit_weights: [vocabulary, h]. The losses of all tokens, [s, b], rank after
        rank, on every rank; backward is of this rank's own. Collective."""
        bounds = tile_bounds(lm_output.shape[0], num_chunk)
        targets = labels.transpose(0, 1)

        def run(index: int, tile: Tensor) -> Tensor:
            own = targets[slice(*bounds[index])]
            found = TokenLosses.apply(F.linear(tile, logit_weights), own, None, 0, -100)
            assert isinstance(found, Tensor), "one output"
            return found

        params = [logit_weights] if logit_weights.requires_grad else []
        losses = tiled(run, Concatenated(0, bounds), bounds, 0, lm_output, params)
        if spg is None or spg_size == 1:
            return losses
        joined = _JoinedSequence.apply(losses, spg, 0, False)
        assert isinstance(joined, Tensor), "one output"
        return joined


class _Resting:
    """Keys or values of a piece: where they are computed, or in pinned main memory until they are asked for.

    Copies are queued on `copies`, one after the other, and the current stream waits for those that come back: the host waits for none.
    """

    def __init__(self, tensor: Tensor, copies: CopyStream | None) -> None:
        self._copies = copies
        self._coming: tuple[Tensor, Any] | None = None
        self.dtype = tensor.dtype
        self._held = tensor
        if copies is not None:
            self._held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies.copy(self._held, tensor)

    def start(self) -> None:
        """Begin to bring the tensor back."""
        if self._copies is not None and self._coming is None:
            into = torch.empty_like(self._held, device=self._copies.device)
            self._coming = into, self._copies.copy(into, self._held)

    def get(self) -> Tensor:
        """The tensor, where it was."""
        self.start()
        if self._coming is None:
            return self._held
        (tensor, event), self._coming = self._coming, None
        Ordered(event).wait()
        return tensor


def _in_turn(pieces: Sequence[tuple[_Resting, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of each piece, on their way while those of the piece before are used."""
    for here, after in zip(pieces, (*pieces[1:], ()), strict=True):
        found = tuple(each.get() for each in here)
        for each in after:
            each.start()
        yield found


class _ByPieces(torch.autograd.Function):
    """Causal attention of whole sequences whose queries, keys and values come piece by piece: [pieces][b, h, s_i, d]."""

    @staticmethod
    def forward(ctx: Any, num: int, copies: CopyStream | None, scale: float, *pieces: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values = ([_Resting(t, copies) for t in pieces[i::3]] for i in range(3))
        outputs, sums = [], []
        ctx.lengths = [t.shape[2] for t in pieces[0::3]]
        for i in range(num):
            joined, query = block.Joined(), queries[i].get()
            seen = list(zip(keys[: i + 1], values[: i + 1], strict=True))
            for j, (key, value) in enumerate(_in_turn(seen)):
                joined.add(*block.forward(query, key, value, scale, _mask(ctx.lengths, i, j, query.device)))
            assert joined.output is not None, "a piece sees itself"
            assert joined.lse is not None, "a piece sees itself"
            outputs.append(joined.output.to(query.dtype))
            sums.append(joined.lse)
        ctx.held, ctx.num, ctx.scale = (queries, keys, values), num, scale
        ctx.outputs, ctx.sums = [_Resting(t, copies) for t in outputs], sums
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        queries, keys, values = ctx.held
        totals: list[list[Tensor | None]] = [[None] * ctx.num for _ in range(3)]
        for j in range(ctx.num):
            key, value = keys[j].get(), values[j].get()
            seen = list(zip(queries[j:], ctx.outputs[j:], strict=True))
            for i, (query, output) in enumerate(_in_turn(seen), start=j):
                mask = _mask(ctx.lengths, i, j, query.device)
                found = block.backward(grads[i], query, key, value, output, ctx.sums[i], ctx.scale, mask)
                for total, n, grad in zip(totals, (i, j, j), found, strict=True):
                    before = total[n]
                    total[n] = grad.float() if before is None else before.add_(grad)
        flat = [total[i] for i in range(ctx.num) for total in totals]
        kinds = [each[i] for i in range(ctx.num) for each in (queries, keys, values)]
        return None, None, None, *(t if t is None else t.to(k.dtype) for t, k in zip(flat, kinds, strict=True))


def _mask(lengths: list[int], i: int, j: int, device: torch.device) -> block.Mask:
    """Of piece i's queries to piece j's keys."""
    starts = [sum(lengths[:n]) for n in (i, j)]
    query, key = (
        torch.arange(start, start + lengths[n], device=device) for start, n in zip(starts, (i, j), strict=True)
    )
    return block.Mask(query, key, is_causal=i == j)


class FPDT_Attention(nn.Module):  # noqa: N801 - the public name
    """A causal attention layer, from hidden states to hidden states, a chunk at a time.

    config: has num_attention_heads, optionally num_key_value_heads and kv_channels (the width of a head). first_weight and
    first_bias: the fused projection, the rows of a key head's queries, its key and its value together (as Megatron-LM has them);
    second_*: the output's. chunk_size: tokens of all ranks together. The hidden states are in the order of `FPDT_InputConstruct`.
    """

    def __init__(
        self,
        config: Any,
        first_weight: Tensor,
        first_bias: Tensor | None,
        second_weight: Tensor,
        second_bias: Tensor | None,
        sequence_process_group: Group,
        gather_idx: int = 0,
        scatter_idx: int = 2,
        return_bias: bool = True,
        chunk_size: int = 65536,
        enable_offloading: bool = True,
    ) -> None:
        super().__init__()
        if (gather_idx, scatter_idx) != (0, 2):
            raise DeepSpeedError(
                f"FPDT_Attention(gather_idx={gather_idx}, scatter_idx={scatter_idx}): hidden states are [sequence, batch, hidden], "
                "so these are 0 and 2."
            )
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim = getattr(config, "kv_channels", None) or second_weight.shape[1] // self.num_heads
        self.qkv_linear_weight, self.qkv_linear_bias = first_weight, first_bias
        self.qkv_dense_weight, self.qkv_dense_bias = second_weight, second_bias
        self.spg = sequence_process_group
        self.return_bias, self.chunk_size, self.enable_offloading = return_bias, chunk_size, enable_offloading

    def forward(
        self,
        layernorm_output: Tensor,
        attention_mask: Any = None,
        inference_params: Any = None,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """layernorm_output: [s/P, b, h]. (output, bias): the bias apart with return_bias, else added and None. rotary_pos_emb:
        the angles [s, 1, 1, width] of the whole sequence, or (cos, sin) of them. Collective."""
        if inference_params is not None:
            raise DeepSpeedError("FPDT_Attention trains: inference_params cannot be given.")
        num_ranks = dist.get_world_size(self.spg)
        if self.chunk_size % num_ranks:
            raise DeepSpeedError(
                f"FPDT_Attention(chunk_size={self.chunk_size}) does not divide by the {num_ranks} ranks."
            )
        chunks = layernorm_output.split(self.chunk_size // num_ranks)
        heads = share_heads(self.num_heads, self.num_kv_heads, num_ranks)
        cos_sin = _cos_sin(rotary_pos_emb)
        pieces: list[Tensor] = []
        seen = 0
        for chunk in chunks:
            layout = layout_of(self.spg, [chunk.shape[0]] * num_ranks, 0, 2)
            moved = to_heads(self._projected(chunk), qkv_ranges(heads), layout, self.spg)
            if cos_sin is not None:
                cos, sin = (t[seen : seen + layout.own_length] for t in cos_sin)
                moved = (*(apply_rotary_pos_emb(t, cos, sin) for t in moved[:2]), moved[2])
            seen += layout.own_length
            pieces += [t.permute(1, 2, 0, 3) for t in moved]
        device = layernorm_output.device
        copies = CopyStream(device) if self.enable_offloading and device.type != "cpu" else None
        outputs = _ByPieces.apply(len(chunks), copies, self.head_dim**-0.5, *pieces)
        bias = None if self.return_bias else self.qkv_dense_bias
        done = []
        for chunk, output in zip(chunks, outputs, strict=True):
            layout = layout_of(self.spg, [chunk.shape[0]] * num_ranks, 0, 2)
            (own,) = to_sequence((output.permute(2, 0, 1, 3),), (heads.query,), layout, self.spg)
            done.append(F.linear(own.flatten(2), self.qkv_dense_weight, bias))
        return torch.cat(done), self.qkv_dense_bias if self.return_bias else None

    def _projected(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a chunk, [s, b, heads, width]."""
        size = self.num_heads // self.num_kv_heads
        mixed = F.linear(chunk, self.qkv_linear_weight, self.qkv_linear_bias)
        mixed = mixed.unflatten(-1, (self.num_kv_heads, size + 2, self.head_dim))
        query, key, value = mixed.split([size, 1, 1], dim=-2)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _cos_sin(rotary: Any) -> tuple[Tensor, Tensor] | None:
    if rotary is None:
        return None
    if isinstance(rotary, (tuple, list)) and len(rotary) == 2:
        first, second = rotary
        is_pair_of_angles = first is second or (first.shape == second.shape and torch.equal(first, second))
        return (first.cos(), first.sin()) if is_pair_of_angles else (first, second)
    return rotary.cos(), rotary.sin()


class SequenceChunk(_Resting):
    """The original's name of a chunk that rests."""

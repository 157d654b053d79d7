"""Runs of what works on parts of sequences, for a device that is not the CPU: heads exchanged, keys round a ring, tiles, chunks.

As `features.py`, whose table has them. Attention is computed block by block on both devices: the CPU has fused kernels of its own,
whose last bits are others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepspeed.activation.hidden import get_checkpoint_hidden_states_offloading_ctx_manager
from deepspeed.parallel.sequence import block
from deepspeed.parallel.sequence.inputs import IGNORED
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence.fpdt_layer import FPDT_Attention
from tests.device import cases
from tests.device.cases import Found, masters, moved, settings
from tests.engine.runs import engine_of
from tests.parallel.sequence import runs
from tests.parallel.sequence.test_fpdt import CHUNK, CONFIG, hidden, order, weights
from tests.parallel.sequence.test_tiled import Tiled


@contextlib.contextmanager
def block_by_block() -> Iterator[None]:
    """In the block attention is products and sums that both devices have."""
    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(block, "_is_fused", return_value=False):
        yield


def _llama(rank: int, stage: int, **model: Any) -> Found:
    losses = []
    with block_by_block(), contextlib.ExitStack() as undo:
        llama = runs.tiny_model(**model)
        mpu = UlyssesSPAttentionHF.register_with_transformers(llama, "sdpa", 2, micro_batch_size=1)
        undo.callback(parallel_state_sp.destroy_sequence_parallel)
        undo.callback(UlyssesSPAttentionHF.unregister)
        engine = undo.enter_context(engine_of(llama, settings(stage) | {"train_micro_batch_size_per_gpu": 1}, mpu=mpu))
        for step in range(cases.STEPS):
            part = runs.cut(runs.batch_of("packed", seed=step), rank, 2)
            group = parallel_state_sp.get_sequence_parallel_group()
            loss = runs.own_loss(engine, moved(part, engine.device), "gathered", group)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, masters(engine)


def sequence(rank: int, world_size: int, stage: int) -> Found:
    """A Llama of which both ranks see half of every sequence."""
    return _llama(rank, stage)


def ring(rank: int, world_size: int, stage: int) -> Found:
    """The same with one key head, which goes round the ranks."""
    return _llama(rank, stage, kv=1)


def tiles(rank: int, world_size: int, stage: int) -> Found:
    """An MLP and logits with their loss, a few tokens at a time; in one step a tile has no target, in another none has one."""
    torch.manual_seed(7)
    losses = []
    with engine_of(Tiled(is_tiled=True), settings(stage, clip=0.5) | {"train_micro_batch_size_per_gpu": 1}) as engine:
        for step in range(cases.STEPS):
            make = torch.Generator().manual_seed(10 * rank + step)
            x, y = torch.randn(1, 7, 6, generator=make), torch.randint(9, (1, 7), generator=make)
            y[:, [slice(0), slice(2, 6), slice(None)][step % 3]] = IGNORED
            loss = engine(x.to(engine.device), y.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, masters(engine)


class Chunked(nn.Module):
    """FPDT's attention alone; keys and values of chunks rest in main memory."""

    def __init__(self) -> None:
        super().__init__()
        made = [nn.Parameter(weight.detach()) for weight in weights()]
        self.layer = FPDT_Attention(CONFIG, *made, dist.group.WORLD, return_bias=False, chunk_size=CHUNK)

    def forward(self, x: Tensor, angle: Tensor, grad: Tensor) -> Tensor:
        output, _ = self.layer(x, rotary_pos_emb=angle)
        return (output * grad).sum()


def chunks(rank: int, world_size: int, stage: int) -> Found:
    """Attention by chunks of two ranks, whose weights are data-parallel."""
    own, (x, grad, angle) = order(rank, world_size), hidden()
    losses = []
    with block_by_block(), engine_of(Chunked(), settings(stage) | {"train_micro_batch_size_per_gpu": 1}) as engine:
        for step in range(cases.STEPS):
            parts = [x[own] * (step + 1), angle, grad[own]]
            loss = engine(*(part.to(engine.device) for part in parts))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, masters(engine)


def hidden_away(rank: int, world_size: int, stage: int) -> Found:
    """Inputs of checkpointed blocks in main memory, by the context that scripts put around the forward."""
    losses = []
    make_context = get_checkpoint_hidden_states_offloading_ctx_manager
    with block_by_block(), engine_of(_Checkpointed(), settings(stage)) as engine:
        for step in range(cases.STEPS):
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(10 * rank + step)).to(engine.device)
            with make_context(min_offload_bytes=1):
                loss = engine(x)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, masters(engine)


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for each in self.blocks:
            x = torch.utils.checkpoint.checkpoint(each, x, use_reentrant=False)
        return x.square().mean()

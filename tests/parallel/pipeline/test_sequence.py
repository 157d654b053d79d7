"""Stages whose ranks have parts of the same sequences equal one process that has the whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.parallel.pipeline.grid import PipelineParallelGrid
from deepspeed.parallel.pipeline.layers import LayerSpec
from deepspeed.parallel.pipeline.module import PipelineModule
from deepspeed.parallel.pipeline.topology import ProcessTopology
from deepspeed.sequence.layer import DistributedAttention
from tests.harness import run_ranks
from tests.parallel.pipeline.models import LONG, WIDTH, config_of, start, whole_weights

SEQ = 8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[batch, seq, heads, width], causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Attention(nn.Module):
    """Over whole sequences, of which this rank has a part where there is a group."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.spread = None if group is None else DistributedAttention(attend, group, scatter_idx=2, gather_idx=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)) for part in self.qkv(x).chunk(3, -1))
        mixed = attend(q, k, v) if self.spread is None else self.spread(q, k, v, 0)
        hidden: Tensor = x + self.out(mixed.flatten(-2))
        return hidden


def _batches(parts: int, part: int) -> Any:
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        x, y = (torch.randn(4, SEQ, WIDTH, generator=generator) for _ in range(2))
        yield x.chunk(parts, 1)[part], y.chunk(parts, 1)[part]


def _train(rank: int, world: int, stages: int, parts: int, zeros: list[int]) -> list[Any]:
    topology = ProcessTopology(["pipe", "data", "sequence"], [stages, world // (stages * parts), parts])
    grid = PipelineParallelGrid(topology)
    group = grid.get_sequence_parallel_group() if parts > 1 else None
    found = []
    for zero in zeros:
        layers = [LayerSpec(Attention, group) for _ in range(4)]
        module = PipelineModule(layers, topology=topology, loss_fn=nn.MSELoss(), seed_layers=True)
        schedule = "zb-h1" if zero == 1 else "1f1b"
        engine = start(module, config_of(zero, schedule=schedule, gradient_clipping=0.1))
        data = _batches(parts, grid.get_sequence_parallel_rank())
        losses = [engine.train_batch(data).item() for _ in range(2)]
        found.append((losses, engine.get_global_grad_norm(), whole_weights(engine)))
        engine.destroy()
    return found


def test_parts_of_sequences_in_each_stage_equal_one_process() -> None:
    zeros = [0, 1, 2, 3] if LONG else [1]
    (expected,) = run_ranks(1, _train, 1, 1, zeros)
    for found in run_ranks(4, _train, 2, 2, zeros):
        for zero, mine, wanted in zip(zeros, found, expected, strict=True):
            assert mine[0] == pytest.approx(wanted[0], rel=1e-6), zero
            assert mine[1] == pytest.approx(wanted[1], rel=1e-5), zero
            for name, value in mine[2].items():
                assert torch.allclose(value, wanted[2][name], atol=1e-6), (zero, name)

"""Stages are cut by what layers take in time and memory, measured once, without a trace left in them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.parallel.pipeline.layers import LayerError, LayerSpec, TiedLayerSpec
from deepspeed.parallel.pipeline.module import PipelineModule
from deepspeed.parallel.pipeline.profile import measure
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.harness import run_ranks


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x)


class Keeping(nn.Linear):
    """Has autograd keep a lot of its micro-batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.repeat(1, 40).relu().view(len(x), 40, -1).mean(1))


def _layers(special: type[nn.Module]) -> list[Any]:
    """The special layers come first; by parameters the cut would be in the middle."""
    return [LayerSpec(special, 8, 8), LayerSpec(special, 8, 8), *(LayerSpec(nn.Linear, 8, 8) for _ in range(4))]


def _cut(rank: int, world: int) -> list[list[int]]:
    found = []
    x = torch.randn(64, 8)
    for special, method in ((Slow, "time"), (Keeping, "memory"), (Slow, "parameters")):
        given = {"sample_inputs": x} if method != "parameters" else {}
        found.append(PipelineModule(_layers(special), num_stages=2, partition_method=method, **given).parts)
    with pytest.raises(DeepSpeedConfigError, match="give PipelineModule sample_inputs"):
        PipelineModule(_layers(Slow), num_stages=2, partition_method="time")
    with pytest.raises(LayerError, match="the layers do not run on sample_inputs: RuntimeError"):
        PipelineModule(_layers(Slow), num_stages=2, partition_method="time", sample_inputs=torch.randn(2, 3))
    return found


def test_layers_are_cut_where_time_or_memory_is_even() -> None:
    for by_time, by_memory, by_parameters in run_ranks(2, _cut):
        assert by_time == [0, 1, 6]
        assert by_memory == [0, 1, 6]
        assert by_parameters == [0, 3, 6]


def test_measuring_leaves_no_trace() -> None:
    norm = nn.BatchNorm1d(8)
    tied = [
        TiedLayerSpec("key", nn.Linear, 8, 8),
        TiedLayerSpec("key", nn.Linear, 8, 8, forward_fn=lambda m, x: x @ m.weight),
    ]
    x, before = torch.randn(4, 8), torch.random.get_rng_state()
    taken = measure([norm, nn.Dropout(), *tied, lambda x: (x, x > 0), lambda pair: pair[0]], x)
    assert torch.equal(before, torch.random.get_rng_state())
    assert norm.num_batches_tracked.item() == 0 and norm.weight.grad is None
    assert [layer.trained_nbytes for layer in taken] == [64, 0, 288, 288, 0, 0]
    assert taken[2].saved_nbytes >= 4 * 8 * 4

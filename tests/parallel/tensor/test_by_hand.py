"""Layers that scripts cut by hand are the whole layer together; parameters are whole for a while; shard sizes by heads."""

from __future__ import annotations

import copy

import torch
from torch import nn

from deepspeed.module_inject.layers import (
    GatherReplacedLayerParams,
    LinearAllreduce,
    LinearLayer,
    LmHeadLinearAllreduce,
)
from deepspeed.module_inject.tp_shard import get_shard_size, get_shard_size_list
from tests.harness import run_ranks


def compare(rank: int, world_size: int) -> None:
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    up, down, x = nn.Linear(6, 9), nn.Linear(9, 5), torch.randn(2, 3, 6, requires_grad=True)
    want = down(up(x).relu())
    want.square().sum().backward()
    expected, grad = x.grad, up.weight.grad
    x.grad = None
    column = LinearLayer(copy.deepcopy(up), group)
    row = LinearAllreduce(copy.deepcopy(down), group)
    got = row(column(x).relu())
    got.square().sum().backward()
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(x.grad, expected, atol=1e-4)
    own = slice(0, 5) if rank == 0 else slice(5, 9)
    assert torch.allclose(column.weight.grad, grad[own], atol=1e-4)
    with GatherReplacedLayerParams(column.weight, column):
        assert torch.equal(column.weight.data, up.weight.data)
        column.weight.data.add_(1.0)
    assert torch.equal(column.weight.data, up.weight.data[own] + 1.0)
    joined = LinearLayer(copy.deepcopy(up), group, gather_output=True)
    assert torch.allclose(joined(x), up(x), atol=1e-6)
    assert torch.allclose(LmHeadLinearAllreduce(copy.deepcopy(up), group)(x), up(x), atol=1e-6)
    assert LinearLayer(copy.deepcopy(up))(x).shape == (2, 3, 9)


def test_layers_that_are_cut_by_hand_are_the_whole_one_together() -> None:
    run_ranks(2, compare)


def test_shard_sizes_keep_key_heads_whole() -> None:
    assert get_shard_size_list(1024, 3, 8, "self_attn.k_proj") == [384, 384, 256]
    assert get_shard_size_list(1024, 3, 2) == [512, 512, 0]
    assert get_shard_size_list(10, 3, "mlp.up_proj") == [4, 3, 3]
    assert get_shard_size(10, 3, None, "lm_head", rank=0) == 4

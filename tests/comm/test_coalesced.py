"""The coalesced collectives and the compressed backend, by the names that scripts import."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.comm.onebit import padded_numel
from deepspeed.runtime.comm.coalesced_collectives import (
    all_to_all_loco_quant_reduce,
    all_to_all_quant_reduce,
    reduce_scatter_coalesced,
)
from deepspeed.runtime.comm.compressed import CompressedBackend
from deepspeed.runtime.comm.nccl import NcclBackend
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import end_group, run_ranks
from tests.optim.onebit_oracle import Compression

SHAPES = [(7, 7), (3,), (0,), (1,), (16, 12)]


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank + 10 * len(shape))).to(dtype)


def parts(rank: int, world_size: int) -> list[Tensor]:
    tensors = [values(rank, shape, torch.bfloat16 if shape == (3,) else torch.float32) for shape in SHAPES]
    return reduce_scatter_coalesced(tensors)


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_gets_its_part_of_the_mean_of_every_tensor(world_size: int) -> None:
    found = run_ranks(world_size, parts)
    for i, shape in enumerate(SHAPES):
        dtype = torch.bfloat16 if shape == (3,) else torch.float32
        mean = sum(values(rank, shape, dtype).float() for rank in range(world_size)) / world_size
        share = -(-mean.numel() // world_size)
        for rank in range(world_size):
            expected = mean.flatten()[rank * share : (rank + 1) * share].to(dtype)
            assert torch.allclose(found[rank][i], expected), (shape, rank)
    if world_size == 2:
        assert [len(found[rank][0]) for rank in range(2)] == [25, 24]


def quantized(rank: int, world_size: int) -> list[list[Tensor]]:
    groups = {"local_0": dist.new_group(list(range(world_size)))}
    groups |= {f"global_{i}": dist.new_group([i]) for i in range(world_size)}
    tensors = [values(rank, shape) for shape in SHAPES]
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for param, tensor in zip(params, tensors, strict=True):
        param.grad = tensor
    loco = {"err_beta": 0.0, "reset_T": 100}
    calls = [all_to_all_loco_quant_reduce(params, groups, loco) for _ in range(20)]
    mean = [torch.stack(of_one).mean(0) for of_one in zip(*calls, strict=True)]
    found = [all_to_all_quant_reduce(tensors, groups), reduce_scatter_coalesced(tensors), mean]
    with pytest.raises(DeepSpeedError, match=r"do not have this rank in one `local_<node>`"):
        all_to_all_quant_reduce(tensors, {"local_0": groups["local_0"]})
    integers: list[Any] = [torch.ones(64, 4, dtype=torch.int32)]
    for call, told in (
        (lambda: reduce_scatter_coalesced(integers), r"reduce_scatter_coalesced: a tensor of torch\.int32 has no mean"),
        (lambda: reduce_scatter_coalesced(torch.ones(4)), "Tensor is no list of tensors"),  # type: ignore[arg-type]
        (lambda: all_to_all_quant_reduce(integers, groups), r"all_to_all_quant_reduce: a tensor of torch\.int32"),
        (lambda: all_to_all_loco_quant_reduce(params, groups, {"err_beta": 0.8}), '"reset_T", a whole number'),
        (lambda: all_to_all_loco_quant_reduce(params, groups, {"err_beta": 2, "reset_T": 4}), "err_beta' ?: 2"),
        (
            lambda: CompressedBackend().compressed_allreduce(integers[0], torch.zeros(256), torch.zeros(128)),
            r"a buffer of torch\.int32",
        ),
    ):
        with pytest.raises(DeepSpeedError, match=told):
            call()
    for group in groups.values():
        if isinstance(group, dist.ProcessGroup):
            end_group(group)
    return found


def test_quantised_means_are_near_and_what_does_not_divide_is_exact() -> None:
    for coded, exact, fed_back in run_ranks(2, quantized):
        for i in range(4):
            assert torch.equal(coded[i], exact[i])
        assert not torch.equal(coded[4], exact[4])
        assert (coded[4] - exact[4]).abs().max() < exact[4].abs().max() / 4
        assert (fed_back[4] - exact[4]).abs().max() < (coded[4] - exact[4]).abs().max() / 3


def compressed(rank: int, world_size: int, numel: int) -> list[Tensor]:
    backend = NcclBackend()
    assert (backend.size, backend.rank) == (world_size, rank)
    padded = padded_numel(numel, world_size)
    worker, server = torch.zeros(padded), torch.zeros(padded // world_size)
    found = []
    for step in range(3):
        buffer = values(rank + 5 * step, (numel,))
        assert backend.compressed_allreduce(buffer, worker, server, rank) is buffer
        found.append(buffer)
    with pytest.raises(DeepSpeedError, match=rf"Make them of {padded} and {padded // world_size} zeros"):
        CompressedBackend().compressed_allreduce(torch.zeros(numel), torch.zeros(3), server, rank)
    return found


@pytest.mark.parametrize(("world_size", "numel"), [(2, 1000), (3, 100), (2, 64)])
def test_the_compressed_backend_has_the_bits_of_a_simulation(world_size: int, numel: int) -> None:
    found = run_ranks(world_size, compressed, numel)
    simulated = Compression(world_size, numel)
    for step in range(3):
        mean = simulated.mean([values(rank + 5 * step, (numel,)) for rank in range(world_size)])
        assert all(torch.equal(of_rank[step], mean) for of_rank in found)

"""Parameters that share memory are refused by name before anything is laid into buckets; those that share a storage train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.zero.overlaps import overlap_of
from tests.harness import run_ranks


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)


def assign_data(model: Two) -> None:
    model.b.weight.data = model.a.weight.data


def transpose(model: Two) -> None:
    model.b.weight = nn.Parameter(model.a.weight.detach().t())


def slice_rows(model: Two) -> None:
    model.b.weight = nn.Parameter(model.a.weight.detach()[1:3])


def reach_into_a_flat_one(model: Two) -> None:
    model.flat = nn.Parameter(torch.randn(20))
    model.b.weight = nn.Parameter(model.flat.detach()[4:].view(4, 4))


def see_as_complex(model: Two) -> None:
    model.b.weight = nn.Parameter(torch.view_as_complex(model.a.weight.detach().view(4, 2, 2)))


def freeze_the_other(model: Two) -> None:
    assign_data(model)
    model.a.weight.requires_grad_(False)


OVERLAPS = (assign_data, transpose, slice_rows, reach_into_a_flat_one, see_as_complex, freeze_the_other)


def lie_side_by_side(model: Two) -> None:
    flat = torch.randn(8, 4)
    model.a.weight, model.b.weight = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])


def interlace(model: Two) -> None:
    flat = torch.randn(4, 8)
    model.a.weight, model.b.weight = nn.Parameter(flat[:, ::2]), nn.Parameter(flat[:, 1::2])


def be_one_object(model: Two) -> None:
    model.b.weight = model.a.weight


def be_frozen(model: Two) -> None:
    assign_data(model)
    model.requires_grad_(False)


@pytest.mark.parametrize("edit", OVERLAPS)
def test_parameters_that_share_elements_are_named(edit: Callable[[Two], None]) -> None:
    model = Two()
    edit(model)
    told = overlap_of(model)
    assert told is not None and "b.weight" in told and "lie in the same memory" in told and ".data.clone()" in told


@pytest.mark.parametrize("edit", [lie_side_by_side, interlace, be_one_object, be_frozen])
def test_parameters_that_share_no_element_or_do_not_train_pass(edit: Callable[[Two], None]) -> None:
    model = Two()
    edit(model)
    assert overlap_of(model) is None


def initialize(rank: int, world_size: int) -> None:
    for stage in range(4):
        model = Two()
        if rank == 0:  # refused on all ranks, though one alone built it so
            assign_data(model)
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        with pytest.raises(DeepSpeedError, match=r"a\.weight and b\.weight lie in the same memory"):
            deepspeed.initialize(model=model, config=config, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_initialize_refuses_them_on_every_rank() -> None:
    run_ranks(2, initialize)

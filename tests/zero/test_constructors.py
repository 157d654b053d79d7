"""Constructors that copy, load, tie and edit layers build under `zero.Init` what they build without it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import deepspeed
from tests.harness import run_ranks
from tests.zero.sharded import whole_values


class Teacher(nn.Module):
    """An EMA teacher, as a copy of what was registered before."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


class Loaded(nn.Module):
    """One layer gets the state dict of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.load_state_dict(self.a.state_dict())


class Cloned(nn.Module):
    """Clones of a layer that is registered nowhere."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(2)])
        self.width = nn.Parameter(torch.ones(self.layers[0].weight.shape[1]))


class Edited(nn.Module):
    """Edits of `.data` in place and by assignment, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.a.weight.data[0] = 7.0
        self.b.weight.data = self.a.weight.data * 2
        self.c.weight = self.a.weight
        nn.init.zeros_(self.c.bias)


BUILD: dict[str, Callable[[], nn.Module]] = {
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12), 2),
    "transformer": lambda: nn.Transformer(6, 2, 1, 1, 12),
    "teacher": Teacher,
    "loaded": Loaded,
    "cloned": Cloned,
    "edited": Edited,
}


def built(rank: int, world_size: int, name: str, dtype: torch.dtype, nested: bool) -> None:
    torch.manual_seed(rank)
    with deepspeed.zero.Init(dtype=dtype):
        if nested:
            with deepspeed.zero.Init(dtype=dtype):
                model = BUILD[name]()
        else:
            model = BUILD[name]()
    torch.manual_seed(0)
    plain = BUILD[name]()
    values = whole_values(model)
    assert values.keys() == {key for key, _ in plain.named_parameters()}
    for key, param in plain.named_parameters():
        assert torch.equal(values[key], param.detach().to(dtype)), key
        assert model.get_parameter(key).requires_grad is param.requires_grad
        assert model.get_parameter(key).numel() == 0, f"{key} is not sharded"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in sorted(BUILD)),
        # A layer is cast when its parent takes it; one that is initialised again after that draws in bf16.
        *((name, torch.bfloat16) for name in ("cloned", "loaded", "teacher")),
    ],
)
def test_a_constructor_builds_the_first_ranks_weights(name: str, dtype: torch.dtype, world_size: int) -> None:
    run_ranks(world_size, built, name, dtype, False)


@pytest.mark.parametrize("name", ["encoder", "teacher"])
def test_a_constructor_in_nested_contexts_too(name: str) -> None:
    run_ranks(2, built, name, torch.float32, True)

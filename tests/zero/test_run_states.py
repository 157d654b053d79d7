"""What a script makes of `optimizer.state`, by the model's parameters, at every stage and place."""

from __future__ import annotations

import collections
import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.errors import NotAvailableError, TrainingStateError
from tests.edits import Edit, assert_same, two_sides
from tests.engine.runs import long_but
from tests.harness import run_ranks

PLACES: dict[str, dict[str, Any]] = {
    "memory": {},
    "cpu": {"offload_optimizer": {"device": "cpu"}},
    "nvme": {"offload_optimizer": {"device": "nvme"}},
}


def optimizer_of(side: Any) -> torch.optim.Optimizer:
    return getattr(side, "client", None) or side.optimizer


def params_of(side: Any) -> list[Any]:
    """Those of the layers, as the optimizer of this side knows them."""
    params = list(side.module.layers.parameters())
    return params if hasattr(side, "client") else [side.masters[param] for param in params]


def pop(side: Any) -> None:
    for param in params_of(side):
        optimizer_of(side).state.pop(param, None)


def delete(side: Any) -> None:
    state = optimizer_of(side).state
    for param in params_of(side):
        if param in state:
            del state[param]
    assert getattr(side, "world_size", 1) > 1 or not any(param in state for param in params_of(side))


def empty(side: Any) -> None:
    for param in params_of(side):
        optimizer_of(side).state[param] = {}


def clear(side: Any) -> None:
    optimizer_of(side).state.clear()


def replace(side: Any) -> None:
    optimizer_of(side).state = collections.defaultdict(dict)


def load(side: Any) -> None:
    """An optimizer's dictionary from before a step, through a pickle."""
    state = pickle.loads(pickle.dumps(optimizer_of(side).state_dict()))
    side.backward(50)
    side.step()
    optimizer_of(side).load_state_dict(state)


RESETS: list[Edit] = [pop, delete, empty, clear, replace]


def same(rank: int, world_size: int, edit: Edit, stage: int, place: str, folder: str) -> None:
    zero = {key: {**value, "nvme_path": folder} if place == "nvme" else value for key, value in PLACES[place].items()}
    with two_sides(rank, world_size, stage, optimizer="adamw", **zero) as sides:
        for side in sides:
            for seed in range(2):
                side.backward(seed)
                side.step()
            edit(side)
            for seed in range(2, 4):
                side.backward(seed)
                side.step()
        assert_same(*sides)


CASES = [
    (edit, stage, place, world_size)
    for edit, stage, place, world_size in itertools.product([*RESETS, load], range(4), PLACES, (1, 2))
    if not (place == "cpu" and stage == 0) and not (place == "nvme" and (stage < 3 or edit is load))
]
SHORT = [
    (pop, 0, "memory", 1), (pop, 2, "memory", 2), (delete, 3, "cpu", 2), (empty, 3, "nvme", 2), (clear, 1, "cpu", 1),
    (replace, 3, "nvme", 1), (load, 2, "cpu", 2),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "stage", "place", "world_size"), long_but(SHORT, CASES))
def test_states_that_a_script_drops_or_loads_are_those_of_the_next_step(
    edit: Edit, stage: int, place: str, world_size: int, tmp_path: Any
) -> None:
    run_ranks(world_size, same, edit, stage, place, str(tmp_path))


def to_then(rank: int, world_size: int, stage: int, dtype: torch.dtype, place: str) -> None:
    with two_sides(rank, world_size, stage, dtype, "adamw", **PLACES[place]) as (_, side):
        side.backward(0)
        side.step()
        optimizer = side.engine.optimizer
        then = copy.deepcopy(optimizer.state_dict())
        exact = {name: safe_get_full_fp32_param(param) for name, param in side.module.named_parameters()}
        weights = side.weights()
        side.backward(1)
        side.step()
        optimizer.load_state_dict(then)
        assert all(torch.equal(value, weights[name]) for name, value in side.weights().items())
        for name, param in side.module.named_parameters():
            assert torch.equal(safe_get_full_fp32_param(param), exact[name])


@pytest.mark.parametrize(("stage", "place"), [(0, "memory"), (2, "memory"), (1, "cpu"), (2, "cpu"), (3, "cpu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_engines_optimizer_loads_masters_and_with_them_weights(stage: int, dtype: torch.dtype, place: str) -> None:
    run_ranks(2, to_then, stage, dtype, place)


def mask(side: Any) -> None:
    """As pruning does with a parameter's momentum, in its shape."""
    for param in params_of(side):
        state = optimizer_of(side).state[param]
        assert state["exp_avg"].shape == param.shape
        state["exp_avg"].mul_(torch.arange(8) < 4)
        state["exp_avg_sq"] = torch.full_like(state["exp_avg_sq"], 0.25)
        state["step"] = torch.tensor(7.0)


def exchange(side: Any) -> None:
    state = optimizer_of(side).state
    one, two = params_of(side)[0], params_of(side)[2]
    state[one], state[two] = dict(state[two]), dict(state[one])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("edit", [mask, exchange])
def test_where_all_states_are_in_memory_a_parameter_shows_its_own_in_its_shape(edit: Edit, world_size: int) -> None:
    run_ranks(world_size, same, edit, 0, "memory", "")


def refused(rank: int, world_size: int) -> None:
    with two_sides(rank, world_size, 1, optimizer="adamw") as (_, side):
        side.backward(0)
        side.step()
        param = side.module.layers[0].weight
        assert param in side.client.state
        for use in (lambda: side.client.state[param], lambda: side.client.state.__setitem__(param, {"exp_avg": param})):
            with pytest.raises(
                TrainingStateError, match="state\\[param\\] of layers.0.weight.*\n.*safe_get_full_optimizer_state"
            ):
                use()  # type: ignore[no-untyped-call]


def test_where_ranks_have_parts_of_a_state_reading_it_says_how() -> None:
    run_ranks(2, refused)


def on_disk(rank: int, world_size: int, folder: str) -> None:
    place = {"offload_optimizer": {"device": "nvme", "nvme_path": folder}}
    with two_sides(rank, world_size, 3, optimizer="adamw", **place) as (_, side):
        side.backward(0)
        side.step()
        moment = next(iter(side.client.state.values()))["exp_avg"]
        uses: list[Callable[[], Any]] = [moment.zero_, moment.norm, lambda: pickle.dumps(side.client.state_dict())]
        for use in uses:
            with pytest.raises(NotAvailableError, match="rests on the nvme tier"):
                use()


def test_a_state_on_disk_says_so_where_it_is_used(tmp_path: Any) -> None:
    run_ranks(1, on_disk, str(tmp_path))


def asked(rank: int, world_size: int, stage: int) -> None:
    with two_sides(rank, world_size, stage, optimizer="adamw") as (_, side):
        side.backward(0)
        side.step()
        state, params = side.client.state, params_of(side)
        assert all(param in state for param in params)
        for param in params[1::2]:
            del state[param]
        assert [param in state for param in params] == [i % 2 == 0 for i in range(len(params))]
        with pytest.raises(KeyError):
            del state[params[1]]
        side.backward(1)
        side.step()
        assert all(param in state for param in params)


@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (1, 2), (2, 2)])
def test_a_dropped_state_is_gone_on_each_rank_until_the_next_step(stage: int, world_size: int) -> None:
    run_ranks(world_size, asked, stage)

"""What messages cost: their count from the plan, their price from two small engines here."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from deepspeed.engine import message_costs
from deepspeed.engine.engine import DeepSpeedEngine
from deepspeed.memory.estimator import Estimator
from deepspeed.memory.messages import Messages
from deepspeed.planner.cost import Choice, Tier, Work, step_parts
from deepspeed.profiling.rates import Rates, undisturbed
from tests.harness import run_ranks

WORK = Work(num_params=1000, flops=6000.0, forward_flops=2000.0, activation_nbytes=0.0, is_host=True)
RATES = Rates(
    matmul_flops=1e9, copy_nbytes_s=1e9, wire_nbytes_s=1e6, wire_latency_s=1.0, message_s=2.0, sum_message_s=3.0
)
CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}


def priced(rank: int, world_size: int) -> dict[str, float]:
    """Of two turns: what is told does not depend on how often it was compared."""
    model = nn.Linear(2, 2)
    before = torch.get_rng_state()
    with mock.patch.multiple(message_costs, PASSES=1, NUM_TURNS=2, NUM_WARM=1):
        found = message_costs.message_costs(DeepSpeedEngine, RATES)
    assert torch.equal(before, torch.get_rng_state()) and model.weight.grad is None
    return found


def test_what_gathers_cost_is_told_by_steps_that_make_many() -> None:
    estimator = Estimator(message_costs.Stack(), torch.ones(1, message_costs.WIDTH))
    zeros = [message_costs.SHARDED, {"stage": 3}]
    many, none = (
        estimator.estimate({**CONFIG, "zero_optimization": zero}, world_size=2, bounds=False).unshards for zero in zeros
    )
    assert none == (0, 0)
    units = 2 * message_costs.NUM_UNITS - 1  # in forward and in backward, where the last one is there still
    assert many == (units, units * message_costs.NUM_LAYERS // message_costs.NUM_UNITS)


def test_of_many_runs_those_that_were_hardly_disturbed_count() -> None:
    calm, disturbed = [1.0, 1.1, 1.2], [5.0] * 5
    assert undisturbed([*disturbed, *calm]) == 1.1
    assert undisturbed([2.0]) == 2.0


def test_ranks_agree_on_what_a_message_costs() -> None:
    first, second = run_ranks(2, priced)
    assert first == second and set(first) == {
        "sum_message_s", "message_s", "unshard_s", "unshard_late_s", "unshard_param_s", "shared_message_s", "shared_nbytes_s", "shared_wait", "update_s", "update_param_s"
    }  # fmt: skip
    assert first["update_s"] > 0, "an optimizer's step is never free"
    assert all(math.isfinite(cost) and 0 <= cost < 1 for name, cost in first.items() if name != "shared_nbytes_s")


@pytest.mark.parametrize(
    ("sent", "gather", "reduce"),
    [
        ({"zero.all_reduce": Messages(3, 2_000_000)}, 0.0, 2.0 + 9.0),
        ({"zero.reduce_scatter": Messages(4, 2_000_000), "zero.all_gather": Messages(8, 4_000_000)}, 2 + 16.0, 1 + 8.0),
        ({}, 0.0, 0.0),
    ],
)
def test_counted_messages_cost_their_bytes_and_their_number(
    sent: dict[str, Messages], gather: float, reduce: float
) -> None:
    parts = step_parts(RATES, WORK, Choice(stage=1, micro=1, ranks=2, messages=sent))
    copies = 3 * 4 * WORK.num_params / RATES.copy_nbytes_s
    assert (parts.gather, parts.reduce) == (pytest.approx(gather), pytest.approx(reduce + copies))


@pytest.mark.parametrize("tier", ["device", "cpu", "nvme"])
def test_an_update_costs_its_calls_and_its_parameters_besides_its_bytes(tier: Tier) -> None:
    choice = Choice(stage=0, micro=1, states_on=tier)
    work = replace(WORK, num_tensors=10)
    free, paid = (
        step_parts(rates, work, choice).update for rates in (RATES, replace(RATES, update_s=5.0, update_param_s=0.1))
    )
    assert paid - free == pytest.approx(5.0 + 10 * 0.1)


def test_one_rank_alone_prices_its_updates_and_no_message() -> None:
    (found,) = run_ranks(1, priced)
    assert set(found) == {"update_s", "update_param_s"} and found["update_s"] > 0


def test_where_no_price_was_measured_a_message_costs_the_latency() -> None:
    sent = {"zero.reduce_scatter": Messages(4, 0)}
    rates = replace(RATES, message_s=0.0, sum_message_s=0.0)
    copies = 3 * 4 * WORK.num_params / RATES.copy_nbytes_s
    assert step_parts(rates, WORK, Choice(stage=1, micro=1, ranks=2, messages=sent)).reduce == pytest.approx(4 + copies)

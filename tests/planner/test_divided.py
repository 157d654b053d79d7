"""Divided steps: the cost model of a rank's share, and bubbles beside schedules' lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deepspeed.memory.inside import Inside, Way
from deepspeed.memory.messages import Messages
from deepspeed.memory.shape import ModelShape
from deepspeed.planner.cost import Choice, Work, step_parts
from deepspeed.planner.divided import divided_parts
from deepspeed.planner.layouts import Layout
from deepspeed.profiling.rates import Rates

RATES = Rates(matmul_flops=1e11, copy_nbytes_s=1e10, wire_nbytes_s=1e9, wire_latency_s=1e-5)
WORK = Work(num_params=4 * 10**6 + 2000, flops=3e9, forward_flops=1e9, activation_nbytes=4e6, num_modules=40, is_host=True)  # fmt: skip
SHAPE = ModelShape(
    name="stack", num_blocks=4, block_params=10**6, block_cut_params=10**6, block_expert_params=0, outer_params=2000,
    first_params=1000, block_flops=7e8, outer_flops=2e8, block_kept_nbytes=9e5, outer_kept_nbytes=4e5, boundary_nbytes=65536.0,
    itemsize=4, num_heads=8, num_kv_heads=8,
    inside={Way(2).name(): Inside(block={"tensor.all_reduce": (4, 4 * 65536)}, first={"tensor.all_reduce": (1, 65536)},
                                  last={"tensor.all_reduce": (1, 65536), "tensor.all_gather": (1, 8192)})},
)  # fmt: skip


def parts(layout: Layout, shape: ModelShape | None = SHAPE) -> Any:
    ranks = layout.dp * layout.sp
    choice = Choice(stage=layout.stage, micro=layout.micro, accumulation=layout.accumulation, ranks=ranks)
    return divided_parts(RATES, WORK, choice, shape, layout)


def test_a_layout_that_divides_nothing_is_a_data_parallel_step() -> None:
    for layout in (Layout(), Layout(dp=4, stage=2, micro=4, accumulation=2)):
        choice = Choice(stage=layout.stage, micro=layout.micro, accumulation=layout.accumulation, ranks=layout.dp)
        assert parts(layout) == parts(layout, None) == step_parts(RATES, WORK, choice)


def test_a_rank_that_was_traced_computes_what_was_traced() -> None:
    layout = Layout(micro=8, tp=2)
    choice = Choice(stage=0, micro=8)
    halves, more = (divided_parts(RATES, WORK, choice, SHAPE, layout, flops=share * WORK.flops) for share in (0.5, 0.6))
    assert halves == parts(layout)
    assert more.compute > halves.compute and more.inside == halves.inside


def test_ranks_that_share_layers_compute_and_update_less_and_send_what_their_layers_need() -> None:
    one, two = parts(Layout(micro=8)), parts(Layout(micro=8, tp=2))
    assert one.busy / 2 < two.busy < 0.75 * one.busy
    assert two.update == pytest.approx(one.update / 2, rel=1e-3)
    sums = 4 * 4 + 2
    assert two.inside == pytest.approx((sums * 8 * 65536 + 8 * 8192 / 2) / 1e9 + (sums + 1) * 1e-5)
    exchanged, told = 4 * 2 * 8 * 65536 / 2 * 4 / 2, (8 * 6 * 2 + 8 * 8 * 2) / 2
    assert parts(Layout(micro=8, sp=2)).inside == pytest.approx((exchanged + told) / 1e9 + 18e-5)


def test_without_a_shape_layers_send_what_was_counted_of_the_step() -> None:
    sent = {"tensor.all_reduce": Messages(10, 4 * 10**6), "zero.all_reduce": Messages(3, 10**6)}
    choice = Choice(stage=0, micro=1, ranks=2, messages=sent)
    found = divided_parts(RATES, WORK, choice, None, Layout(dp=2, tp=2))
    assert found.inside == pytest.approx(4e6 / 1e9 + 10 * 1e-5)
    assert found.reduce > 0, "ZeRO's are another part"


def test_a_message_amid_computing_has_a_price_a_rate_and_a_wait_of_its_own() -> None:
    rates = replace(RATES, shared_message_s=2e-3, shared_nbytes_s=1e8, shared_wait=0.25)
    layout, choice = Layout(micro=8, tp=2), Choice(stage=0, micro=8)
    found = divided_parts(rates, WORK, choice, SHAPE, layout)
    sums = 4 * 4 + 2
    sent_s = (sums * 8 * 65536 + 8 * 8192 / 2) / 1e8 + (sums + 1) * 2e-3
    assert found.inside == pytest.approx(sent_s + 0.25 * found.busy)
    assert divided_parts(rates, WORK, choice, SHAPE, Layout(micro=8)).inside == 0, "who shares nothing waits for nobody"


@pytest.mark.parametrize(("stages", "micros"), [(2, 1), (2, 8), (4, 6)])
def test_a_pipelines_bubble_is_that_of_its_list(stages: int, micros: int) -> None:
    found = divided_parts(
        replace(RATES, wire_latency_s=0.0, wire_nbytes_s=1e30),
        WORK,
        Choice(stage=0, micro=2, accumulation=micros),
        SHAPE,
        Layout(pp=stages, micro=2, accumulation=micros),
    )
    assert found.bubble / (found.busy + found.bubble) == pytest.approx((stages - 1) / (micros + stages - 1))

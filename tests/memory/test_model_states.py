"""The original's estimators: figures of its documentation, and its tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepspeed.memory.model_states import (
    GIB,
    count_params,
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_live,
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
)


@pytest.mark.parametrize(
    ("offload", "host", "device"),
    [(True, 2851 * 32 * 1.5, 2851 * 2), (False, 2851 * 32 * 1.5, 2851 * 2 + 18 * 2851 / 8)],
)
def test_stage_2_follows_its_formula(offload: bool, host: float, device: float) -> None:
    found = estimate_zero2_model_states_mem_needs(2851 * 10**6, 8, 1, cpu_offload=offload)
    assert found == (int(host * 10**6), int(device * 10**6))


@pytest.mark.parametrize(
    ("options", "host_gib", "device_gib"),
    [
        ((True, True, True), 71.69, 0.12),
        ((True, True, False), 127.45, 0.12),
        ((True, False, True), 63.72, 0.78),
        ((True, False, False), 127.45, 0.78),
        ((False, False, True), 1.43, 6.09),
        ((False, False, False), 127.45, 6.09),
    ],
)
def test_stage_3_follows_its_formula(options: tuple[bool, bool, bool], host_gib: float, device_gib: float) -> None:
    host, device, largest = estimate_zero3_model_states_mem_needs(2851 * 10**6, 32 * 10**6, 8, 1, *options)
    assert (round(host / GIB, 2), round(device / GIB, 2), largest) == (host_gib, device_gib, 4 * 32 * 10**6)


def test_parameters_that_share_memory_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach())
    assert count_params(model) == (16 + 8, 16)
    with torch.device("meta"):
        assert count_params(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == (40, 20)


def test_tables_name_the_setup_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    estimate_zero3_model_states_mem_needs_all_cold(2851 * 10**6, 32 * 10**6, 8, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "HW: Setup with 2 nodes, 8 GPUs per node.",
        "SW: Model with 2851M total params, 32M largest layer params.",
        "  per CPU  |  per GPU |   Options",
    ]
    assert len(lines) == 10 and lines[4] == (
        "  35.85GB |   0.12GB | offload_param=cpu , offload_optimizer=cpu , zero_init=1"
    )
    estimate_zero2_model_states_mem_needs_all_live(nn.Linear(1000, 1000), 1)
    assert capsys.readouterr().out.splitlines()[-1] == "   0.01GB |   0.02GB | offload_optimizer=none"

"""The measure of peak memory: the highest sum of blocks in use, as the profiler's record tells it."""

from __future__ import annotations

import pytest
import torch

from deepspeed.memory.measure import measure_peak, peak_of


@pytest.mark.parametrize(
    ("blocks", "peak"),
    [
        ([(0, 100), (200, 50), (0, -100), (0, 60)], 150),
        ([(900, -100), (0, 70)], 0),  # a block from before went
    ],
)
def test_the_peak_is_of_what_is_in_use_at_once(blocks: list[tuple[int, int]], peak: int) -> None:
    assert peak_of(blocks) == peak


@pytest.mark.parametrize(
    "blocks",
    [
        [(0, 100), (0, 100), (0, -100)],
        [(0, 100), (50, 100)],
        [(50, 100), (0, 60)],
        [(0, 40), (40, 40), (80, 20), (20, 70), (200, 30)],
    ],
)
def test_a_block_whose_address_is_handed_out_anew_has_ended(blocks: list[tuple[int, int]]) -> None:
    assert peak_of(blocks) == 100


def test_what_is_allocated_is_measured() -> None:
    def run() -> None:
        kept = [torch.zeros(250) for _ in range(10)]
        del kept[5:]
        torch.zeros(1000)

    assert measure_peak(run).allocated_nbytes == 10_000

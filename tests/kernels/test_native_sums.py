"""The compiled sums of ranks' messages: the reference bit for bit, on every instruction set and any number of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from deepspeed.kernels import native_sums
from deepspeed.kernels.reference import sums as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 1025, 33_001]
BAD = [float("nan"), float("inf"), -float("inf"), 3e38, 1e-44]


def _parts(num_parts: int, numel: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(numel)
    parts = [torch.randn(numel, generator=generator) for _ in range(num_parts)]
    parts[0][: len(BAD)] = torch.tensor(BAD)[:numel]
    parts[-1][: len(BAD)] = torch.tensor(BAD[1:] + BAD[:1])[:numel]
    return [part.to(dtype) for part in parts]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_equal_the_reference_bit_for_bit(isa: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for num_parts, numel, divide_by, accumulate in itertools.product((2, 3), SIZES, (1, 3), (False, True)):
        parts = _parts(num_parts, numel, dtype)
        ours = torch.linspace(-1, 1, numel).to(out_dtype)
        theirs = ours.clone()
        native_sums.add_up(parts, ours, divide_by, accumulate)
        reference.add_up(parts, theirs, divide_by, accumulate)
        assert _same(ours, theirs), (num_parts, numel, divide_by, accumulate)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_sum_may_take_the_place_of_a_part_of_it(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for dtype, i in itertools.product(DTYPES, range(3)):
            parts = _parts(3, 70_001, dtype)
            expected = torch.empty(70_001, dtype=dtype)
            reference.add_up(parts, expected, 3, False)
            native_sums.add_up(parts, parts[i], 3, False)
            assert _same(parts[i], expected)
    finally:
        torch.set_num_threads(before)


def test_wider_dtypes_are_added_in_their_own() -> None:
    parts = [torch.full((3,), 1.0, dtype=torch.float64), torch.full((3,), 1e-12, dtype=torch.float64)]
    out = torch.empty(3, dtype=torch.float64)
    native_sums.add_up(parts, out, 1, False)
    assert torch.equal(out, parts[0] + parts[1]) and out[0] != 1.0

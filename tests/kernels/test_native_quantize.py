"""The compiled quantisation and signs: the reference bit for bit, on every instruction set and any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepspeed.kernels import native_quantize
from deepspeed.kernels.reference import quantize as reference
from deepspeed.kernels.reference import signs as reference_signs
from deepspeed.utils.errors import DeepSpeedError

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(320, 64), (231, 33), (4000, 1000), (10, 2), (6144, 2048), (7, 1), (0, 4)]
FORMS = [(8, True), (8, False), (4, True), (4, False)]


def _same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    if ours.is_floating_point():
        ours, theirs = ours.nan_to_num(1e30), theirs.nan_to_num(1e30)
    return ours.dtype is theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_quantisation_equals_the_reference_bit_for_bit(isa: str, dtype: torch.dtype, bad: float | None) -> None:
    for numel, group_size in SIZES:
        x = (torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 3).to(dtype)
        x[:group_size] = 0
        if bad is not None:
            x[-1:] = bad
        for num_bits, symmetric in FORMS:
            if num_bits == 4 and group_size % 2:
                continue
            ours = native_quantize.quantize(x, group_size, num_bits, symmetric=symmetric)
            theirs = reference.quantize(x, group_size, num_bits, symmetric=symmetric)
            assert all(map(_same, ours, theirs))
            for out in (FP32, BF16, FP16):
                again = native_quantize.dequantize(ours, num_bits, out)
                assert _same(again, reference.dequantize(theirs, num_bits, out))


def test_signs_equal_the_reference_bit_for_bit_and_the_error_carries_on(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    errors = [torch.zeros(8 * 20001), torch.zeros(8 * 20001)]
    sums = [torch.zeros(8 * 20001), torch.zeros(8 * 20001)]
    for _ in range(3):
        x = torch.randn(8 * 20001, generator=generator)
        x[:5] = -errors[0][:5]  # an error of zero, of either sign
        ours = native_quantize.compress_signs(x, errors[0])
        theirs = reference_signs.compress_signs(x, errors[1])
        assert all(map(_same, ours, theirs))
        native_quantize.add_signs(*(ours[0], sums[0], ours[1]))
        reference_signs.add_signs(*(theirs[0], sums[1], theirs[1]))
        assert _same(*errors)
        assert _same(*sums)


def test_what_was_sent_and_the_error_are_what_was_given() -> None:
    x = torch.randn(800)
    error, sent = torch.zeros(800), torch.zeros(800)
    for _ in range(50):
        bits, scale = native_quantize.compress_signs(x, error)
        native_quantize.add_signs(bits, sent, scale)
    torch.testing.assert_close(sent + error, 50 * x, rtol=1e-4, atol=1e-3)


def test_results_do_not_depend_on_threads() -> None:
    x = torch.randn(512 * 1024)
    found = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            error = torch.zeros_like(x)
            found.append((*native_quantize.quantize(x, 128)[:2], *native_quantize.compress_signs(x, error), error))
    finally:
        torch.set_num_threads(threads)
    assert all(map(_same, *found))


def test_other_dtypes_and_memory_with_gaps_go_to_the_reference() -> None:
    wide = torch.randn(64, dtype=torch.float64)
    assert all(map(_same, native_quantize.quantize(wide, 8), reference.quantize(wide, 8)))
    gaps = torch.randn(16, 8)[:, ::2]
    assert all(map(_same, native_quantize.quantize(gaps, 8), reference.quantize(gaps, 8)))


def test_signs_that_do_not_fill_bytes_are_refused() -> None:
    with pytest.raises(DeepSpeedError, match="12 elements: their signs do not fill whole bytes"):
        native_quantize.compress_signs(torch.zeros(12), torch.zeros(12))

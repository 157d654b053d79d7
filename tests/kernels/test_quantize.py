"""The reference of group-wise quantisation: bounds, formats, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed.kernels.reference.quantize import dequantize, pack_nibbles, quantize, unpack_nibbles
from deepspeed.utils.errors import DeepSpeedError


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.sampled_from([2, 6, 64]), st.sampled_from([4, 8]), st.booleans(), st.floats(1e-20, 1e20)
)
def test_an_element_comes_back_within_half_a_scale(
    seed: int, group: int, num_bits: int, symmetric: bool, size: float
) -> None:
    x = torch.randn(5 * group, generator=torch.Generator().manual_seed(seed)) * size
    packed = quantize(x, group, num_bits, symmetric=symmetric)
    error = (dequantize(packed, num_bits) - x).abs().view(-1, group)
    assert (error <= packed.scales[:, None] * (0.5 + 1e-4)).all()


def test_four_bits_take_half_a_byte_and_the_even_position_is_low() -> None:
    assert pack_nibbles(torch.tensor([1, 2, 15, 0])).tolist() == [0x21, 0x0F]
    assert unpack_nibbles(torch.tensor([0x21, 0x0F], dtype=torch.uint8)).tolist() == [1, 2, 15, 0]
    assert quantize(torch.randn(64), 64, 4).values.shape == (1, 32)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_groups_come_back_exactly(num_bits: int, symmetric: bool) -> None:
    zeros = torch.zeros(8)
    assert torch.equal(dequantize(quantize(zeros, 4, num_bits, symmetric=symmetric), num_bits), zeros)
    if not symmetric:
        threes = torch.full((8,), 3.0)
        assert torch.equal(dequantize(quantize(threes, 4, num_bits, symmetric=False), num_bits), threes)


@pytest.mark.parametrize(
    ("numel", "group", "num_bits", "words"),
    [
        (10, 4, 8, "group_size = 4 does not divide 10 elements"),
        (10, 0, 8, "group_size = 0 does not divide 10"),
        (9, 3, 4, "group_size = 3 is odd: two elements of 4 bits share a byte"),
        (8, 4, 3, "num_bits = 3: elements are quantised to 4 or 8 bits"),
    ],
)
def test_sizes_that_do_not_go_are_refused(numel: int, group: int, num_bits: int, words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        quantize(torch.zeros(numel), group, num_bits)

"""`Quantizer` and `DeQuantizer`: the original's format to the bit, and within half a step of what was quantized."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

_utils = importlib.import_module("deepspeed.inference.quantization.utils")


def _config(bits: int, dim: int, size: int = 64) -> dict[str, Any]:
    return {"num_bits": bits, "group_size": size, "group_dim": dim, "symmetric": False}


@pytest.mark.parametrize(("bits", "dim"), [(8, 1), (4, 1), (8, 0), (4, 0)])
def test_elements_come_back_within_half_a_step_of_their_group(bits: int, dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 192)
    x[0 if dim else slice(None, 64), slice(None, 64) if dim else 0] = 3.0  # a group of equal elements
    config = _config(bits, dim)
    q, scale, low = _utils.Quantizer(config).quantize(x)
    assert q.dtype is torch.uint8 and q.shape == (128, 192 * bits // 8)
    assert scale.shape == low.shape == ((128, 3, 1) if dim else (2, 1, 192))
    found = _utils.DeQuantizer(config, torch.float32).dequantize(q, scale, low)
    half = (
        (0.5 / scale).expand(128, 3, 64).reshape(x.shape) if dim else (0.5 / scale).expand(2, 64, 192).reshape(x.shape)
    )
    assert ((found - x).abs() <= half * 1.00001 + 1e-6).all()
    assert _utils.DeQuantizer(config, torch.float16).dequantize(q, scale, low).dtype is torch.float16


def test_of_two_elements_of_four_bits_the_first_is_in_the_high_bits() -> None:
    q, scale, low = _utils.Quantizer(_config(4, 0, 4)).quantize(torch.tensor([0.0, 15.0, 5.0, 1.0]))
    assert q.tolist() == [0x0F, 0x51] and scale.item() == 1 and low.item() == 0


def test_what_does_not_go_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size = 64 does not divide dim 1 of"):
        _utils.Quantizer(_config(8, 1)).quantize(torch.zeros(2, 65))
    with pytest.raises(ValueError, match="symmetric = true"):
        _utils.Quantizer({**_config(8, 1), "symmetric": True})
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        _utils.Quantizer(_config(8, 0)).quantize(torch.full((64,), float("nan")))

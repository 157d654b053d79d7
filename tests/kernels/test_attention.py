"""Attention of one new token over a cache: the reference against torch's own, the compiled loops against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed.kernels import native, native_attention
from deepspeed.kernels.reference import attention as reference
from deepspeed.kernels.reference.quantize import quantize
from deepspeed.kernels.table import pick
from deepspeed.utils.errors import DeepSpeedError

needs_library = pytest.mark.skipif(native.library() is None, reason="the compiled loops are not built")
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
SHAPES = [
    (1, 4, 4, 1, 16), (2, 8, 2, 31, 64), (1, 7, 1, 600, 80), (1, 12, 4, 1025, 128), (3, 6, 3, 513, 48),
    (1, 16, 2, 577, 128), (1, 13, 1, 95, 512), (2, 24, 2, 33, 112),
]  # fmt: skip
"""batch, heads, shared, positions, dim"""


def case(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """A query and a cache, which is a slice of a larger one."""
    batch, heads, shared, positions, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(batch, heads, dim, generator=generator)
    wholes = [torch.randn(batch, shared, positions + 5, dim, generator=generator) for _ in range(2)]
    found: dict[str, Any] = {"query": query, "scale": dim**-0.5}
    for name, whole in zip(("key", "value"), wholes, strict=True):
        if dtype is torch.int8:
            packed = quantize(whole, dim)
            found[f"{name}s"] = packed.values.view(whole.shape)[:, :, 2 : positions + 2]
            found[f"{name}_scales"] = packed.scales.view(whole.shape[:3])[:, :, 2 : positions + 2]
        else:
            found[f"{name}s"] = whole.to(dtype)[:, :, 2 : positions + 2]
    return found


def on_all(**arguments: Any) -> Tensor:
    """What every instruction set gives with one thread and with three; they must agree."""
    found = []
    threads = torch.get_num_threads()
    try:
        for isa in native.isas():
            native.use_isa(isa)
            for torch_threads in (1, 3):
                torch.set_num_threads(torch_threads)
                found.append(native_attention.decode_attention(**arguments))
    finally:
        native.use_isa()
        torch.set_num_threads(threads)
    assert len(found) == 2 * len(native.isas()) and all(torch.equal(found[0], other) for other in found)
    return found[0]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loops_give_the_references_answer_and_one_answer_on_all_instruction_sets(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    arguments = case(shape, dtype)
    assert native_attention.takes(arguments["keys"], arguments["values"])
    batch, heads, _, positions, _ = shape
    starts = torch.arange(batch) % positions
    ranges = torch.stack([starts, torch.full((batch,), positions) - starts // 2], 1)
    bias = torch.randn(1, heads, positions, generator=torch.Generator().manual_seed(1))
    bias[:, :, ::3] = -torch.inf
    bias[:, :, positions // 2] = 0.5
    for extra in ({}, {"ranges": ranges}, {"bias": bias}, {"ranges": ranges, "bias": bias[:, :1]}):
        expected = reference.decode_attention(**arguments, **extra)
        torch.testing.assert_close(
            on_all(**arguments, **extra), expected, rtol=1e-4, atol=2e-5 if dtype != torch.int8 else 2e-4
        )


def test_the_reference_is_torchs_attention() -> None:
    arguments = case(SHAPES[1], torch.float32)
    expected = F.scaled_dot_product_attention(
        arguments["query"].unsqueeze(2), arguments["keys"], arguments["values"], enable_gqa=True
    ).squeeze(2)
    torch.testing.assert_close(reference.decode_attention(**arguments), expected)


@needs_library
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_that_are_bfloat16_themselves_give_one_answer_on_all_instruction_sets(shape: tuple[int, ...]) -> None:
    """Where an instruction takes them as they are: values beside it are rounded once for each product."""
    arguments = case(shape, torch.bfloat16)
    arguments["query"] = arguments["query"].bfloat16().float()
    expected = reference.decode_attention(**arguments)
    torch.testing.assert_close(on_all(**arguments), expected, rtol=1e-4, atol=2e-5)


@needs_library
def test_a_query_in_bfloat16_errs_no_more_than_torchs_kernel_does() -> None:
    """Weights in 8 bits, as torch has them: their sum is of what was rounded, so that what values have in common is exact."""
    ours, torchs = [], []
    for shape in SHAPES:
        arguments = case(shape, torch.bfloat16)
        query, keys, values = arguments["query"].bfloat16(), arguments["keys"], arguments["values"] + 1
        found = on_all(**{**arguments, "query": query, "values": values})
        exact = reference.decode_attention(query.float(), keys, values, scale=arguments["scale"])
        beside = F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, enable_gqa=True).squeeze(2)
        ours.append((found - exact).flatten())
        torchs.append((beside - exact).flatten())
        weighed = reference.decode_attention(query.float(), keys, values.abs(), scale=arguments["scale"])
        assert (ours[-1].abs() <= (weighed.flatten() + exact.abs().flatten()) / 256).all()  # 2^-9 twice, and out's
    assert torch.cat(ours).square().mean() <= torch.cat(torchs).square().mean()
    assert torch.cat(ours).abs().max() <= torch.cat(torchs).abs().max()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_nothing_is_seen_the_answer_is_zero(dtype: torch.dtype) -> None:
    arguments = case((2, 4, 2, 40, 32), dtype)
    nothing = torch.tensor([[3, 3], [0, 40]])
    for extra in ({"ranges": nothing}, {"bias": torch.full((2, 1, 40), -torch.inf)}):
        for attend in (on_all, reference.decode_attention):
            found = attend(**arguments, **extra)
            assert (found[0] == 0).all() and found.isfinite().all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows(dtype: torch.dtype) -> None:
    arguments = case((1, 4, 2, 40, 32), dtype)
    arguments["keys"] = arguments["keys"].clone()
    arguments["keys"][0, 1, 7, 3] = torch.nan
    found = native_attention.decode_attention(**arguments)
    assert found[0, :2].isfinite().all() and found[0, 2:].isnan().all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_stretch_a_format_give_one_answer_on_all_instruction_sets(dtype: torch.dtype) -> None:
    """Products that must be exact to be alike: of the largest and of tiny magnitudes, and of integers at both ends."""
    arguments = case((1, 8, 1, 70, 128), torch.float32)
    ends = (
        torch.tensor([1.0, -1.0, 1 + 2.0**-7, 2.0**-90, 0.0, -(2.0**60)]).repeat(1494)[: 70 * 128].view(1, 1, 70, 128)
    )
    arguments["query"] = torch.tensor([2.0**-70, 1 + 2.0**-15, -3.0, 0.0]).repeat(256).view(1, 8, 128)
    if dtype is torch.int8:
        scales = torch.full((1, 1, 70), 2.0**-9)
        worst = (ends.sign() * 127).to(torch.int8)
        arguments |= {"keys": worst, "values": worst, "key_scales": scales, "value_scales": scales}
    else:
        arguments |= {"keys": ends.to(dtype), "values": ends.to(dtype)}
    assert on_all(**arguments).isfinite().all()


def test_what_the_loops_do_not_take_goes_to_the_reference() -> None:
    for dim, dtype in ((40, torch.float32), (64, torch.float16)):
        arguments = case((1, 4, 2, 9, dim), torch.float32)
        arguments |= {name: arguments[name].to(dtype) for name in ("keys", "values")}
        found = pick("decode_attention", "cpu")(**arguments)
        assert torch.equal(found, reference.decode_attention(**arguments))


def test_a_query_of_low_precision_gets_its_own_dtype_back() -> None:
    arguments = case(SHAPES[1], torch.bfloat16)
    arguments["query"] = arguments["query"].bfloat16()
    assert pick("decode_attention", "cpu")(**arguments).dtype is torch.bfloat16


def test_shapes_that_do_not_go_together_are_named() -> None:
    arguments = case((2, 4, 2, 9, 32), torch.float32)
    for wrong, words in (
        ({"query": torch.zeros(2, 3, 32)}, r"query \[2, 3, 32\] does not go with keys \[2, 2, 9, 32\]"),
        ({"ranges": torch.tensor([[0, 9]])}, r"ranges are \[1, 2\][^@]*Give \[2, 2\] int64"),
        ({"ranges": torch.tensor([[0, 9], [0, 10]])}, r"reach out of a cache of 9 positions"),
        ({"key_scales": torch.ones(2, 2, 9)}, r"key_scales = \[2, 2, 9\] with keys [^@]*float32"),
    ):
        for attend in (reference.decode_attention, native_attention.decode_attention):
            with pytest.raises(DeepSpeedError, match=words):
                attend(**{**arguments, **wrong})

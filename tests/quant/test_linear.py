"""Quantized layers multiply with the weight they hold: compiled and by torch, on every instruction set, at any size."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepspeed.config.execution import QuantizationSpecConfig
from deepspeed.kernels import native, native_products
from deepspeed.quant import linear
from deepspeed.quant.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from deepspeed.quant.replace import quantize_by_name, quantize_model
from deepspeed.quant.spec import Spec, fitting_group
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

needs_library = pytest.mark.skipif(native.library() is None, reason=f"no compiled library: {native.why_missing()}")


def weight_of(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 192, 24])
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_a_layer_answers_with_the_weight_it_holds(num_bits: int, symmetric: bool, group_size: int, batch: int) -> None:
    held = QuantizedWeight(weight_of(37, 384), Spec(num_bits=num_bits, group_size=group_size, symmetric=symmetric))
    layer, x, bias = QuantizedLinear(held, torch.randn(37)), weight_of(batch, 384, 1), torch.randn(37)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, bias), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_an_element_comes_back_within_half_a_step_of_its_group(num_bits: int) -> None:
    weight = weight_of(16, 256)
    held = QuantizedWeight(weight, Spec(num_bits=num_bits, group_size=64))
    bound = held.scales.view(16, 4).repeat_interleave(64, 1) * (0.5 + 1e-4)
    assert ((held.whole() - weight).abs() <= bound).all()


def on_every_isa(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What every instruction set gives, which must be the same."""
    found = []
    try:
        for isa in native.isas():
            native.use_isa(isa)
            found.append(call())
    finally:
        native.use_isa()
    assert len(found) == len(native.isas()) and all(torch.equal(found[0], other) for other in found)
    return found[0]


@needs_library
@pytest.mark.parametrize("width", [32 * 9 + 5, 4096 + 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_floats_have_the_same_bits_on_every_instruction_set(dtype: torch.dtype, width: int) -> None:
    """Narrow and wide, in a core's caches and beyond; each row of many has what it has alone."""
    weight, x = weight_of(50, width).to(dtype), weight_of(11, width, 1)
    found = on_every_isa(lambda: native_products.product(x, weight, None))
    assert torch.equal(found, torch.cat([native_products.product(row, weight, None) for row in x.split(1)]))


@needs_library
@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(
    ("group_size", "num_groups"), [(32, 9), (64, 3), (64, 12), (64, 13), (96, 8), (160, 3), (1024, 2), (4096, 1)]
)
def test_products_with_integers_have_the_same_bits_on_every_instruction_set(
    num_bits: int, group_size: int, num_groups: int
) -> None:
    """Each row of several has what it has alone."""
    weight, x = weight_of(50, group_size * num_groups), weight_of(7, group_size * num_groups, 1)
    x[1] *= 1e-3
    held = QuantizedWeight(weight, Spec(num_bits=num_bits, group_size=group_size))
    layer = QuantizedLinear(held, None)
    found = on_every_isa(lambda: layer(x))
    assert torch.equal(found, on_every_isa(lambda: torch.cat([layer(row) for row in x.split(1)])))
    whole = held.whole().double()
    rounding = x.abs().amax(1, keepdim=True) / 32639 / 2 * whole.abs().sum(1)  # of inputs to 15 bits
    assert ((found - F.linear(x.double(), whole)).abs() <= rounding * 1.01 + 1e-5).all()


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 31, 96, 1000])
def test_products_with_floats_are_torchs(dtype: torch.dtype, width: int) -> None:
    weight, x, bias = weight_of(70, width).to(dtype), weight_of(2, width, 1), torch.randn(70)
    expected = F.linear(x.double(), weight.double(), bias.double()).float()
    torch.testing.assert_close(native_products.product(x, weight, bias), expected, rtol=1e-5, atol=1e-4)


@needs_library
@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 31, 32, 33, 63, 65, 100, 1111])
def test_each_row_of_a_weight_is_met_once_wherever_reading_begins(num_rows: int) -> None:
    """Rows are read in four places, each further on than the one before it, and come round at their ends."""
    weight, x = weight_of(num_rows, 64), weight_of(1, 64, 1)
    expected = F.linear(x.double(), weight.double()).float()
    torch.testing.assert_close(native_products.product(x, weight, None), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_shows() -> None:
    layer = QuantizedLinear(QuantizedWeight(weight_of(4, 64), Spec()), None)
    x = torch.ones(1, 64)
    x[0, 3] = float("inf")
    assert not torch.isfinite(layer(x)).any()
    with pytest.raises(DeepSpeedError, match="holds NaN or infinity"):
        QuantizedWeight(torch.full((2, 64), float("nan")), Spec())


def test_a_tied_embedding_gives_the_rows_of_the_weight() -> None:
    held = QuantizedWeight(weight_of(20, 64), Spec(num_bits=4, group_size=32))
    indices = torch.tensor([[3, 0], [19, 3]])
    assert torch.equal(QuantizedEmbedding(held, None)(indices), held.whole()[indices])


@pytest.mark.parametrize(("num_bits", "limit"), [(8, 1.1), (4, 0.6)])
def test_a_parameter_takes_the_bytes_that_were_promised(num_bits: int, limit: float) -> None:
    held = QuantizedWeight(weight_of(256, 512), Spec(num_bits=num_bits))
    assert sum(b.numel() * b.element_size() for b in held.buffers()) / (256 * 512) <= limit


def test_group_sizes_fit_widths() -> None:
    assert [fitting_group(width, 64) for width in (512, 96, 48, 50, 7, 2049)] == [64, 32, 48, 50, None, None]
    with pytest.raises(DeepSpeedConfigError, match="num_bits = 3"):
        Spec(num_bits=3)


@pytest.mark.parametrize("num_bits", [8, 4])
def test_a_cast_changes_what_a_weight_becomes_and_not_its_bits(num_bits: int) -> None:
    layer = QuantizedLinear(QuantizedWeight(weight_of(4, 64), Spec(num_bits=num_bits)), torch.ones(4))
    before = [part.clone() for part in layer.quantized.parts if part is not None]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype is dtype and layer.bias is not None and layer.bias.dtype is dtype
        assert all(torch.equal(*pair) for pair in zip(before, layer.quantized.parts, strict=False))
        assert layer(torch.ones(2, 64, dtype=dtype)).dtype is dtype


def test_on_a_device_with_a_kernel_few_rows_meet_the_weight_as_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def product(
        x: torch.Tensor, weight: Any, num_bits: int, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        asked.append((tuple(x.shape), num_bits, rows, weight.values.device.type, bias is not None))
        return x.new_empty(*x.shape[:-1], rows) if len(x) < 3 else None

    found = linear.pick
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: is_cast)  # torch knows none of "meta"
    is_cast = False
    monkeypatch.setattr(
        linear, "pick", lambda name, kind: product if name == "quantized_product" else found(name, kind)
    )
    layer = QuantizedLinear(QuantizedWeight(weight_of(5, 64), Spec(num_bits=4)), torch.zeros(5)).to("meta")
    for rows in (1, 3):
        assert layer(torch.empty(rows, 64, device="meta")).shape == (rows, 5)
    assert asked == [((1, 64), 4, 5, "meta", True), ((3, 64), 4, 5, "meta", True)]
    layer(torch.empty(1, 64, device="meta", requires_grad=True))
    is_cast = True
    layer(torch.empty(1, 64, device="meta"))
    assert len(asked) == 2, "a gradient needs the weight whole, and autocast has a dtype of its own"


WRITING: dict[str, Callable[[QuantizedLinear], Any]] = {
    "in place": lambda layer: layer.weight.mul_(2),
    "data": lambda layer: setattr(layer.weight, "data", torch.zeros(8, 32)),
    "a merged adapter": lambda layer: layer.weight.data.__iadd__(1),
    "a row": lambda layer: layer.weight.__setitem__(0, 1.0),
    "a view": lambda layer: layer.weight.t()[3:5].zero_(),
    "into": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "another": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(8, 32))),
}


@pytest.mark.parametrize("way", WRITING)
def test_writing_to_what_a_weight_is_read_as_is_refused(way: str) -> None:
    held = QuantizedWeight(weight_of(8, 32), Spec())
    for layer in (QuantizedLinear(held, None), QuantizedEmbedding(held, None)):
        with pytest.raises(
            RuntimeError, match="to a quantized layer's weight: what is read there is made from the integers"
        ):
            WRITING[way](layer)  # type: ignore[arg-type]
        read = layer.weight
        assert type(read * 2) is type(read.clone()) is type(copy.deepcopy(read)) is torch.Tensor
        assert type(pickle.loads(pickle.dumps(read))) is torch.Tensor and torch.equal(read, held.whole())


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_embedding_refuses_the_indices_that_a_plain_one_refuses(symmetric: bool) -> None:
    plain = nn.Embedding(12, 64)
    layer = QuantizedEmbedding(
        QuantizedWeight(plain.weight, Spec(num_bits=4, group_size=32, symmetric=symmetric)), None
    )
    for taken in (
        torch.tensor([[3, 0], [11, 5]]),
        torch.tensor([7], dtype=torch.int32),
        torch.zeros(0, 3, dtype=torch.long),
    ):
        assert torch.equal(layer(taken), F.embedding(taken, layer.quantized.whole()))
    for wrong in (torch.tensor([-1]), torch.tensor([12]), torch.tensor([-100, 3])):
        for one in (plain, layer):
            with pytest.raises(IndexError):
                one(wrong)
    for dtype in (torch.uint8, torch.int16, torch.float32, torch.bool):
        for one in (plain, layer):
            with pytest.raises(RuntimeError, match="scalar types: Long, Int"):
                one(torch.tensor([1]).to(dtype))


def test_what_listens_to_a_layer_stays_and_a_forward_of_its_own_is_not_replaced() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    own = model[1].forward
    model[1].forward = lambda x: own(x) * 3  # type: ignore[method-assign]
    handle = model[0].register_forward_hook(lambda layer, args, out: out * 0.5)
    before = model[2].register_forward_pre_hook(lambda layer, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    x = torch.randn(2, 64)
    expected = model(x)
    quantize_model(model, Spec())
    assert [type(layer).__name__ for layer in model] == ["QuantizedLinear", "Linear", "QuantizedLinear"]
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)
    with_both = model(x)
    handle.remove(), before.remove()
    assert not model[0]._forward_hooks and not model[2]._forward_pre_hooks
    assert not torch.allclose(model(x), with_both, rtol=0.05, atol=0.05)


def test_layers_that_were_quantized_otherwise_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, Spec())
    quantize_model(model, Spec(group_size=32))
    with pytest.raises(DeepSpeedConfigError, match=r"0 has a weight of 8 bits \(symmetric\), and 4 bits \(symmetric\)"):
        quantize_model(model, Spec(num_bits=4))
    with pytest.raises(DeepSpeedConfigError, match=r"8 bits \(symmetric\), and 8 bits \(asymmetric\)"):
        quantize_by_name(model, {"0": QuantizationSpecConfig(num_bits=8, group_size=64, group_dim=1, symmetric=False)})

"""oneDNN's products beside torch's: values, gradients of gradients, results written in place, and what is left to torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deepspeed.kernels import onednn
from deepspeed.parallel.expert.experts import Experts

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN: nothing is taken"
)


@pytest.fixture(autouse=True)
def _wherever(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small products too, and on processors where torch's are as fast."""
    onednn.is_faster.cache_clear()
    monkeypatch.setattr(onednn, "MIN_NUMEL", 1)
    monkeypatch.setattr(onednn, "CLEARLY", 0.0)
    yield
    onednn.is_faster.cache_clear()


@pytest.mark.parametrize("num", [1, 3, 4, 15, 33, 64, 100, 512, 513, 4097])
def test_there_is_room_for_all_rows_and_little_more(num: int) -> None:
    assert num <= onednn.room(num) <= max(num + 3, num * 17 // 16)
    assert onednn.room(onednn.room(num)) == onednn.room(num)


def test_few_numbers_of_rows_have_a_kernel() -> None:
    assert len({onednn.room(num) for num in range(512, 1025)}) <= 17


@pytest.mark.parametrize("num", [1, 37, 64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_layer_equals_torch(num: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=has_bias)
    x, wanted = (torch.randn(num, 24).requires_grad_() for _ in range(2))
    wanted.data.copy_(x.data)
    with onednn.LinearByOneDNN():
        result = layer(x)
    assert type(result.grad_fn).__name__ == "LinearBackward"
    expected = functional.linear(wanted, layer.weight, layer.bias)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(result.square().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [wanted, *layer.parameters()])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_result_may_be_overwritten_and_differentiated_twice() -> None:
    x, layer = torch.randn(5, 8).double().float().requires_grad_(), nn.Linear(8, 8)
    with onednn.LinearByOneDNN():
        out = functional.relu_(layer(x))  # 5 rows in a room of 8
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    again = functional.relu(layer(x))
    (expected,) = torch.autograd.grad(again.pow(3).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, twice)


def _taken(rows: Tensor, weight: Tensor) -> bool:
    return onednn.may_help(rows) and onednn.takes(len(rows), weight)


def test_what_is_not_plain_is_left_to_torch() -> None:
    rows, weight = torch.randn(16, 16), torch.randn(16, 16)
    assert _taken(rows, weight)
    assert not _taken(rows.double(), weight.double())
    assert not _taken(rows.bfloat16(), weight.bfloat16())
    assert not _taken(rows.to("meta"), weight.to("meta"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert not _taken(torch.empty(16, 16), torch.empty(16, 16))
        assert not onednn.takes(16, weight)
    torch.use_deterministic_algorithms(True)
    try:
        assert not _taken(rows, weight)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.device("cpu"):  # another mode is on, which would not see what is multiplied
        assert not onednn.may_help(rows)


def test_experts_of_any_make_are_computed_so() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(functional.gelu(self.up(x)))

    torch.manual_seed(0)
    experts, rows = Experts(Mlp(), 3), torch.randn(20, 16)
    nodes: list[str] = []
    experts.deepspeed_experts[1].up.register_forward_hook(lambda _m, _i, out: nodes.append(type(out.grad_fn).__name__))
    result = experts(rows, [7, 13, 0])
    assert nodes == ["LinearBackward"]
    expected = torch.cat([e(part) for e, part in zip(experts.deepspeed_experts, rows.split([7, 13, 0]), strict=True)])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    result.sum().backward()
    assert all(param.grad is not None for param in experts.parameters())
    assert not experts.deepspeed_experts[2].up.weight.grad.any()  # no rows: zeros


def test_on_processors_where_torch_is_as_fast_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "CLEARLY", float("inf"))
    assert not onednn.takes(1 << 20, torch.randn(16, 16))
    assert not onednn.may_help(torch.randn(16, 16))

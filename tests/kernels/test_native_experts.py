"""Compiled experts give what a plain loop gives in fp64, on every instruction set, and are seen by what counts operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspeed.kernels import native, native_experts
from deepspeed.kernels.expert_mlp import AnyActivation, GatedSilu, expert_mlp
from deepspeed.kernels.native_experts import experts, takes
from deepspeed.kernels.pages import MIN_NBYTES
from deepspeed.kernels.reused_memory import MAX_FREE_NBYTES, Reused
from deepspeed.profiling.counter import OpCounter

pytestmark = pytest.mark.skipif(native.isas()[:1] in ([], ["portable"]), reason="a processor without AVX2 and FMA")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    native.use_isa()


def case(width: int, inner: int, counts: list[int]) -> list[Tensor]:
    """tokens, at, weights, up and down, which lie transposed; fp32."""
    draw = torch.Generator().manual_seed(len(counts) * width)
    tokens = torch.randn(sum(counts) // 2 + 3, width, generator=draw)
    at = torch.cat([torch.randint(len(tokens), (count,), generator=draw) for count in counts])
    weights = torch.rand(len(at), 1, generator=draw)
    up = torch.randn(len(counts), 2 * inner, width, generator=draw).transpose(1, 2) / width**0.5
    down = torch.randn(len(counts), width, inner, generator=draw).transpose(1, 2) / inner**0.5
    return [tokens, at, weights, up, down]


def plain(tokens: Tensor, at: Tensor, weights: Tensor, counts: list[int], up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(tokens)
    for e, (rows, factors) in enumerate(zip(at.split(counts), weights.split(counts), strict=True)):
        gate, value = (tokens[rows] @ up[e]).chunk(2, dim=-1)
        out = out.index_add(0, rows, F.silu(gate) * value @ down[e] * factors)
    return out


@pytest.mark.parametrize("isa", [name for name in native.isas() if name in ("avx512", "avx2")])
@pytest.mark.parametrize(
    ("width", "inner", "counts"),
    [
        (32, 16, [5, 0, 1, 31]),
        (48, 80, [17, 16, 33, 32]),
        (112, 48, [0, 0, 0]),
        (16, 272, [500]),
        (528, 112, [7, 193, 386]),
    ],
)
def test_outputs_and_gradients_are_those_of_a_plain_loop(isa: str, width: int, inner: int, counts: list[int]) -> None:
    native.use_isa(isa)
    tokens, at, weights, up, down = case(width, inner, counts)
    leaves = [tensor.requires_grad_() for tensor in (tokens, weights, up, down)]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out, expected = (
        experts(leaves[0], at, leaves[1], counts, *leaves[2:]),
        plain(wide[0], at, wide[1], counts, *wide[2:]),
    )
    came = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    found = (out, *torch.autograd.grad(out, leaves, came))
    oracle = (expected, *torch.autograd.grad(expected, wide, came.double()))
    for mine, exact in zip(found, oracle, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, rtol=1e-5, atol=2e-6 * max(1.0, exact.abs().max().item() if exact.numel() else 0)
        )


def test_the_same_call_gives_the_same_bits() -> None:
    tokens, at, weights, up, down = case(64, 32, [40, 3, 0, 90])
    leaves = [tensor.requires_grad_() for tensor in (tokens, weights, up, down)]

    def run() -> list[Tensor]:
        out = experts(leaves[0], at, leaves[1], [40, 3, 0, 90], *leaves[2:])
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 90.0, -90.0, -3e38, 0.0])
def test_what_is_not_finite_or_far_out_goes_the_way_of_torchs_silu(value: float) -> None:
    tokens = torch.zeros(1, 16, requires_grad=True)
    with torch.no_grad():
        tokens[0, 0] = value
    up, down = torch.zeros(1, 32, 16), torch.eye(16)[None].clone()
    up[0, 0, 0] = up[0, 16, 1] = 1.0
    with torch.no_grad():
        tokens[0, 1] = 1.0
    given = (torch.zeros(1, dtype=torch.int64), torch.ones(1, 1), [1], up.transpose(1, 2), down.transpose(1, 2))
    mine, exact = experts(tokens, *given), plain(tokens, *given)
    torch.testing.assert_close(mine, exact, equal_nan=True)
    of_mine, of_exact = (torch.autograd.grad(out[0, 0], tokens)[0] for out in (mine, exact))
    torch.testing.assert_close(of_mine[0, :2], of_exact[0, :2], equal_nan=True)


def test_frozen_matrices_have_no_gradient() -> None:
    tokens, at, weights, up, down = case(32, 16, [4, 4])
    out = experts(tokens.requires_grad_(), at, weights, [4, 4], up, down)
    out.sum().backward()
    assert tokens.grad is not None and up.grad is None and down.grad is None


def test_gradients_of_gradients_are_those_of_a_plain_loop() -> None:
    counts, found = [4, 0, 9], []
    for compute in (experts, plain):
        tokens, at, weights, up, down = case(32, 16, counts)
        leaves = [tensor.requires_grad_() for tensor in (tokens, weights, up, down)]
        out = compute(leaves[0], at, leaves[1], counts, *leaves[2:])
        (of_tokens,) = torch.autograd.grad(out.square().sum(), tokens, create_graph=True)
        found.append(torch.autograd.grad(of_tokens.square().sum(), leaves))
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-4)


def test_it_is_taken_on_one_thread_for_plain_fp32_that_lies_in_one_piece() -> None:
    tokens, _, weights, up, down = case(32, 16, [4, 4])
    assert takes(tokens, weights, up, down)
    assert not takes(tokens.double(), weights, up, down)
    assert not takes(tokens, weights, up.contiguous(), down)
    assert not takes(*(case(24, 16, [4, 4])[i] for i in (0, 2, 3, 4)))
    torch.set_num_threads(2)
    assert not takes(tokens, weights, up, down)


def test_without_the_library_experts_are_computed_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, at, weights, up, down = case(32, 16, [9, 4])
    mine = expert_mlp(tokens, at, weights, [9, 4], up, down, GatedSilu())
    monkeypatch.setattr(native_experts.native, "isas", list)
    torch.testing.assert_close(expert_mlp(tokens, at, weights, [9, 4], up, down, GatedSilu()), mine)


def test_operations_are_counted_as_those_of_the_loop() -> None:
    tokens, at, weights, up, down = case(32, 16, [9, 4])
    leaves = [tensor.requires_grad_() for tensor in (tokens, weights, up, down)]
    totals = []
    for activation in (GatedSilu(), AnyActivation(lambda up: F.silu(up[:, :16]) * up[:, 16:])):
        counted: list[int] = []
        with OpCounter(lambda _phase, _operation, flops, to=counted: to.append(flops)):
            expert_mlp(leaves[0], at, leaves[1], [9, 4], *leaves[2:], activation).sum().backward()
        totals.append(sum(counted))
    assert totals == [2 * 13 * 3 * 32 * 16 * 3] * 2


def test_memory_is_used_again_once_nothing_is_in_it() -> None:
    memory, shape = Reused(), (MIN_NBYTES // 4,)
    first = memory.empty(shape, torch.float32)
    at, part = first.data_ptr(), first[3:5]
    assert memory.empty(shape, torch.float32).data_ptr() != at
    del first
    assert memory.empty(shape, torch.float32).data_ptr() != at  # a part of it is held
    del part
    taken = [memory.empty(shape, torch.float32) for _ in range(3)]
    assert at in [tensor.data_ptr() for tensor in taken]
    assert memory.empty((3,), torch.float32).shape == (3,)


def test_of_what_is_free_a_bounded_part_is_kept() -> None:
    memory = Reused()
    held = [memory.empty((MIN_NBYTES // 4,), torch.float32) for _ in range(MAX_FREE_NBYTES // MIN_NBYTES + 8)]
    assert len(memory.buffers) == len(held)
    held.clear()
    memory.trim()
    assert sum(map(len, memory.buffers)) == MAX_FREE_NBYTES

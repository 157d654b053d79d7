"""Tokens get to their experts and back whatever the routing is, with exactly the bytes that the routing says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.moe.layer import MoE
from deepspeed.parallel.expert import dispatch
from deepspeed.parallel.expert.capacity import rows_on_the_wire
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.errors import RankMismatchError
from deepspeed.utils.waits import COMMUNICATION
from tests.harness import run_ranks

WIDTH, EXPERTS = 6, 8


def place_of(rank: int, world_size: int, number: int = 0) -> ExpertPlace:
    return ExpertPlace(EXPERTS, world_size, rank, dist.group.WORLD, number)


def scaled(first: int, weight: Tensor) -> Any:
    """Expert e multiplies by matrix e."""

    def compute(rows: Tensor, counts: list[int]) -> Tensor:
        return torch.cat([part @ weight[first + e] for e, part in enumerate(rows.split(counts))])

    return compute


def routing(generator: torch.Generator, rank: int, kind: int) -> tuple[Tensor, Tensor]:
    """Choices and weights of one rank: even, empty, all to one expert, dropped ones, few tokens."""
    k = int(torch.randint(1, 5, (), generator=generator))
    own = torch.Generator().manual_seed(int(torch.randint(0, 10**6, (), generator=generator)) + rank)
    s = int(torch.randint(1, 9, (), generator=own))
    s = 0 if kind == 1 and rank == 0 else s
    choices = (
        torch.stack([torch.randperm(EXPERTS, generator=own)[:k] for _ in range(s)]) if s else torch.zeros(0, k).long()
    )
    if kind == 2:
        choices = torch.full_like(choices, 5)
    if kind == 3 and s:
        choices[torch.rand(choices.shape, generator=own) < 0.5] = -1
    return choices, torch.rand(choices.shape, generator=own)


def random_routings(rank: int, world_size: int, num: int) -> None:
    for case in range(num):
        generator = torch.Generator().manual_seed(case)
        choices, weights = routing(generator, rank, case % 5)
        tokens = torch.randn(len(choices), WIDTH, requires_grad=True)
        weights.requires_grad_()
        matrices = torch.randn(EXPERTS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(case)).requires_grad_()
        place = place_of(rank, world_size)
        result = dispatch.run_experts(tokens, choices, weights, place, dispatch.apart(scaled(place.first, matrices)))
        gradient = torch.randn(result.shape)
        found = torch.autograd.grad(result, (tokens, weights, matrices), gradient, allow_unused=True)
        mask = nn.functional.one_hot(choices.clamp_min(0), EXPERTS) * (choices >= 0)[..., None]
        every = torch.einsum("sh,ehw->sew", tokens, matrices)
        expected = torch.einsum("sk,ske,sew->sw", weights, mask.float(), every)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        wanted = list(torch.autograd.grad(expected, (tokens, weights, matrices), gradient))
        dist.all_reduce(wanted[2])
        own = slice(place.first, place.first + place.num_here)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2][own], wanted[2][own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ranks", "num"), [(2, 60), (4, 40)])
def test_a_hundred_random_routings_equal_a_dense_sum(ranks: int, num: int) -> None:
    run_ranks(ranks, random_routings, num)


def bytes_of_a_call(rank: int, world_size: int, s: int, k: int) -> tuple[int, int]:
    """(bytes that rows took on this rank's wire out, bytes that the routing table says)."""
    sent = []
    original = dispatch._all_to_all

    def counting(into: Tensor, rows: Tensor, *rest: Any) -> None:
        sent.append((rows.nbytes, rows.shape[1]))
        original(into, rows, *rest)

    dispatch._all_to_all = counting  # type: ignore[assignment]
    try:
        generator = torch.Generator().manual_seed(rank)
        choices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(s)])
        place = place_of(rank, world_size)
        tokens = torch.randn(s, WIDTH).bfloat16()
        dispatch.run_experts(tokens, choices, torch.rand(s, k), place, dispatch.apart(lambda rows, _: rows))
    finally:
        dispatch._all_to_all = original
    here = place.num_here
    elsewhere = sum(len({int(e) // here for e in row} - {rank}) for row in choices)
    return sum(n for n, width in sent[:1]), elsewhere * WIDTH * 2


def test_rows_take_exactly_the_bytes_that_the_routing_table_says() -> None:
    s, k = 4000, 2
    found = run_ranks(2, bytes_of_a_call, s, k)
    assert all(sent == told for sent, told in found)
    per_token = sum(sent for sent, _ in found) / (2 * s * WIDTH * 2)
    assert per_token == pytest.approx(rows_on_the_wire(EXPERTS, k, 2)[0], abs=0.02)


def one_rank_alone(rank: int, world_size: int) -> str:
    """Rank 0 runs layer 0 then 1; rank 1 skips layer 0."""
    tokens, choices = torch.randn(3, WIDTH), torch.zeros(3, 1).long()
    with pytest.raises(RankMismatchError) as caught:
        dispatch.run_experts(
            tokens, choices, torch.ones(3, 1), place_of(rank, world_size, number=rank), dispatch.apart(lambda x, _: x)
        )
    return str(caught.value)


def test_a_rank_that_skips_a_layer_is_named_on_all_ranks() -> None:
    for text in run_ranks(2, one_rank_alone):
        assert "rank 0 at layer 0, rank 1 at layer 1" in text


def bytes_alone(rank: int, world_size: int) -> dict[str, int]:
    before = dict(COMMUNICATION.nbytes)
    MoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=4, k=2)(torch.randn(5, WIDTH))[0].sum().backward()
    return {op: nbytes for op, nbytes in COMMUNICATION.nbytes.items() if nbytes != before.get(op)}


def test_a_layer_with_all_experts_here_sends_nothing() -> None:
    assert run_ranks(2, bytes_alone) == [{}, {}]

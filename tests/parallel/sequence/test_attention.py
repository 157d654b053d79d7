"""`DistributedAttention` on two and three ranks against attention over the whole sequence in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepspeed.sequence.layer import DistributedAttention, apply_rotary_pos_emb, single_all_to_all
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.waits import COMMUNICATION
from tests.harness import run_ranks

Case = dict[str, Any]


def local_attention(query: Tensor, key: Tensor, value: Tensor, is_batch_first: bool) -> Tensor:
    """Causal attention over [b, s, h, d] or [s, b, h, d]."""
    dims = (0, 2, 1, 3) if is_batch_first else (1, 2, 0, 3)
    back = (0, 2, 1, 3) if is_batch_first else (2, 0, 1, 3)
    q, k, v = (t.permute(dims) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(back)


def make(case: Case) -> list[Tensor]:
    """Query, key, value of whole sequences, and the gradient of the output."""
    torch.manual_seed(5)
    b, s, d, heads, kv = 2, case["length"], 4, case["heads"], case["kv"]
    return [
        torch.randn(b, s, h, d) if case["is_batch_first"] else torch.randn(s, b, h, d) for h in (heads, kv, kv, heads)
    ]


def expected(case: Case) -> list[Tensor]:
    """Output and the three gradients in one process."""
    q, k, v, g = make(case)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    if case.get("rotary"):
        cos, sin = rotary(case)
        q, k = apply_rotary_pos_emb(q, cos, sin), apply_rotary_pos_emb(k, cos, sin)
    output = local_attention(q, k, v, case["is_batch_first"])
    return [output.detach(), *torch.autograd.grad(output, inputs, g)]


def rotary(case: Case) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 of 4 elements."""
    angle = torch.arange(case["length"])[:, None] * torch.tensor([1.0, 1.0])
    shape = (1, -1, 1, 2) if case["is_batch_first"] else (-1, 1, 1, 2)
    return angle.cos().view(shape), angle.sin().view(shape)


def attend(rank: int, world: int, cases: list[Case]) -> list[list[Tensor]]:
    """Output and gradients of this rank's part, for each case."""
    results = []
    for case in cases:
        seq_dim, batch_dim = (1, 0) if case["is_batch_first"] else (0, 1)
        parts = [t.tensor_split(world, dim=seq_dim) for t in make(case)]
        q, k, v, g = (part[rank].clone() for part in parts)
        inputs = [t.requires_grad_() for t in (q, k, v)]
        layer = DistributedAttention(local_attention, dist.group.WORLD, 2, seq_dim)
        more = {"rotary_pos_emb": rotary(case)} if case.get("rotary") else {}
        lengths = [t.shape[seq_dim] for t in parts[0]]
        output = layer(q, k, v, batch_dim, is_batch_first=case["is_batch_first"], sequence_lengths=lengths, **more)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, g)])
    return results


CASES = [
    {"heads": heads, "kv": kv, "length": length, "is_batch_first": first, "rotary": rotary}
    for heads, kv, length, first, rotary in (
        (4, 4, 8, True, False),
        (4, 4, 8, False, True),
        (6, 2, 8, True, True),
        (6, 1, 9, True, False),
        (9, 3, 7, False, False),
        (10, 2, 7, True, False),
    )
]


@pytest.mark.parametrize("world", [2, 3])
def test_output_and_gradients_equal_attention_in_one_process(world: int) -> None:
    found = run_ranks(world, attend, CASES)
    for i, case in enumerate(CASES):
        seq_dim = 1 if case["is_batch_first"] else 0
        for n, want in enumerate(expected(case)):
            got = torch.cat([found[rank][i][n] for rank in range(world)], dim=seq_dim)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def count_bytes(rank: int, world: int) -> list[tuple[int, int]]:
    """(collectives, bytes to other ranks) forward, and forward and backward."""
    sent: list[int] = []

    class Counts(torch.overrides.TorchFunctionMode):
        pass

    original = dist.all_to_all_single

    def counted(output: Tensor, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = kwargs["input_split_sizes"]
        sent.append(sum(size for i, size in enumerate(sizes) if i != rank) * tensor.element_size())
        return original(output, tensor, *args, **kwargs)

    dist.all_to_all_single = counted
    before = COMMUNICATION.nbytes.get("sequence.all_to_all", 0)
    try:
        q, k, v = (torch.randn(1, 16, heads, 4, requires_grad=True) for heads in (8, 4, 4))
        output = DistributedAttention(local_attention, dist.group.WORLD, 2, 1)(q, k, v, 0, is_batch_first=True)
        forward = len(sent), sum(sent)
        output.sum().backward()
    finally:
        dist.all_to_all_single = original
    assert COMMUNICATION.nbytes["sequence.all_to_all"] - before >= sum(sent), "the report's"
    return [forward, (len(sent), sum(sent))]


def test_a_layer_has_two_collectives_each_way_and_the_bytes_of_the_formula() -> None:
    forward, both = run_ranks(2, count_bytes)[0]
    length, width, ranks = 32, 8 * 4, 2
    elements = (2 + 2 * 4 / 8) * length * width / ranks * (ranks - 1) / ranks
    assert forward == (2, elements * 4)
    assert both == (4, 2 * elements * 4)


def exchange_one(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """There and back by the public function of one tensor."""
    part = torch.arange(2 * 4 * 3 * 2).view(1, 8, 3, 2).float().tensor_split(world, dim=1)[rank]
    there = single_all_to_all(part, 2, 1, 0, dist.group.WORLD, num_kv_heads=3)
    back = single_all_to_all(there, 1, 2, 0, dist.group.WORLD, num_kv_heads=3)
    return there, back - part


def test_one_tensor_goes_there_and_back_with_uneven_heads() -> None:
    found = run_ranks(2, exchange_one)
    assert [tuple(there.shape) for there, _ in found] == [(1, 8, 2, 2), (1, 8, 1, 2)]
    whole = torch.arange(2 * 4 * 3 * 2).view(1, 8, 3, 2).float()
    assert torch.equal(torch.cat([there for there, _ in found], dim=2), whole)
    assert all(not difference.any() for _, difference in found)


def refusals(rank: int, world: int) -> list[str]:
    """What ranks say of inputs that cannot be."""
    said = []
    for heads, options, batch_dim in ((1, {}, 0), (4, {}, 1), (4, {"num_kv_heads": 2}, 0)):
        part = torch.randn(1, 4, heads, 4)
        with pytest.raises(DeepSpeedError) as error:
            DistributedAttention(local_attention, dist.group.WORLD, 2, 1, **options)(part, part, part, batch_dim)
        said.append(str(error.value))
    return said


def test_what_cannot_be_split_is_refused_by_its_numbers() -> None:
    few, layout, kv = run_ranks(2, refusals)[1]
    assert "1 attention heads cannot be split over 2 sequence-parallel ranks" in few
    assert "batch_dim_idx = 1 with gather_idx = 1" in layout
    assert "num_kv_heads=2), but key has 4 heads" in kv


def test_rotation_passes_the_rest_and_turns_halves_against_each_other() -> None:
    t = torch.tensor([1.0, 2.0, 3.0])
    turned = apply_rotary_pos_emb(t, torch.zeros(2), torch.ones(2))
    assert turned.tolist() == [-2.0, 1.0, 3.0]

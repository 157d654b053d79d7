"""Memory that buckets leave and take, while a model only runs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.tiers.pieces import PAGE
from deepspeed.zero import loads, plan
from deepspeed.zero.loads import KeptMemory
from tests.harness import run_alone


def test_memory_that_came_back_is_lent_again_and_starts_at_a_page() -> None:
    memory = KeptMemory(10**9)
    first, second = memory.take(300_000, torch.float32), memory.take(300_000, torch.float32)
    where = first.data_ptr()
    assert (where % PAGE, second.data_ptr() % PAGE) == (0, 0)
    memory.give_back(first)
    memory.give_back(second)
    assert memory.take(300_000, torch.bfloat16).data_ptr() not in (where, second.data_ptr()), "another dtype"
    assert memory.take(300_000, torch.float32).data_ptr() == second.data_ptr(), "the oldest was given up for it"


@pytest.mark.parametrize("max_live_numel", [0, 10**9])
def test_no_more_is_kept_than_was_needed_at_once_and_what_may_live(max_live_numel: int) -> None:
    draw, memory, lent, most = random.Random(7), KeptMemory(max_live_numel), [], 0
    for _ in range(2000):
        if lent and draw.random() < 0.5:
            memory.give_back(lent.pop(draw.randrange(len(lent))))
        else:
            lent.append(memory.take(draw.choice([100, 1000, 1500, 7000]), torch.float32))
            most = max(most, sum(tensor.numel() for tensor in lent))
        assert memory.numel <= most * (KeptMemory.SLACK if max_live_numel else 1)
        if draw.random() < 0.02:
            lent.clear()  # somebody else's now: no more is known of it


def test_memory_that_was_taken_away_or_given_to_a_view_does_not_count() -> None:
    memory = KeptMemory(0)
    tensor = memory.take(1000, torch.float32)
    tensor.untyped_storage().resize_(0)
    assert memory.numel == 0


def run_twice(folder: str) -> None:
    """A model whose weights rest on disk: new memory is mapped in its first calls alone, and a view that is kept keeps its values."""
    plan.MIN_UNIT_NUMEL = 1  # a bucket for each layer
    made: list[int] = []
    page_storage = loads.page_storage
    loads.page_storage = lambda nbytes: made.append(nbytes) or page_storage(nbytes)  # type: ignore[assignment, func-returns-value]
    torch.manual_seed(3)
    plain = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(6)))
    offload = {"device": "nvme", "nvme_path": folder, "max_in_cpu": 0}
    section = {
        "stage": 3, "offload_param": offload, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 2 * 96 * 96,
    }  # fmt: skip
    streamed = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(6)))
    streamed.load_state_dict(plain.state_dict())
    kept: list[Tensor] = []
    keeps = False
    streamed[2].register_forward_hook(
        lambda module, args, output: kept.append(module.weight.data[:3]) if keeps else None
    )
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": section}
    engine = deepspeed.initialize(model=streamed, config=config)[0]
    x = torch.randn(4, 96)
    with torch.no_grad():
        expected = plain(x)
        for _ in range(3):
            assert torch.equal(engine(x), expected)
        num_made = len(made)
        for _ in range(3):
            assert torch.equal(engine(x), expected)
        assert num_made and len(made) == num_made, "all was read into memory that was there"
        keeps = True
        assert torch.equal(engine(x), expected)
        keeps = False
        for _ in range(3):
            assert torch.equal(engine(x), expected)
            assert kept[0].untyped_storage().nbytes() == 0, "never another layer's values"
    engine.destroy()


def test_streamed_weights_are_read_into_memory_that_is_there(tmp_path: Path) -> None:
    run_alone(run_twice, str(tmp_path))

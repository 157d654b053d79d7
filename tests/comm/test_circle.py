"""Integers that go around a circle of ranks: what every rank knows after how many messages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspeed.comm.direct import Circle
from deepspeed.comm.exchange import bytes_of_gather, bytes_of_largest, distances
from tests.harness import end_group, run_ranks


@pytest.mark.parametrize(
    ("num_ranks", "expected"), [(2, "1"), (3, "1 2"), (4, "1 2"), (5, "1 2 4"), (8, "1 2 4"), (9, "1 2 4 8")]
)
def test_the_distances_double(num_ranks: int, expected: str) -> None:
    assert " ".join(map(str, distances(num_ranks))) == expected


@pytest.mark.parametrize("num_ranks", [2, 3, 5, 8, 100, 8192])
def test_after_the_last_round_every_rank_has_heard_of_all(num_ranks: int) -> None:
    known = torch.ones(num_ranks, dtype=torch.int64)
    """How many ranks from itself on each rank knows."""
    for distance in distances(num_ranks):
        known = torch.maximum(known, distance + known.roll(-distance))
    assert bool((known >= num_ranks).all())
    assert len(distances(num_ranks)) == (num_ranks - 1).bit_length()


class Counting:
    """A group that counts what is sent."""

    def __init__(self, group: Any) -> None:
        self.group, self.sent = group, []
        self.rank, self.size, self.recv = group.rank, group.size, group.recv

    def send(self, tensors: list[torch.Tensor], target: int, tag: int) -> Any:
        self.sent.append(tensors[0].nbytes)
        return self.group.send(tensors, target, tag)


def around(rank: int, world_size: int) -> Any:
    group = dist.new_group(backend="gloo")
    counting: Any = Counting(group)
    circle = Circle(counting)
    lowest = -(2**63)
    largest = circle.start_largest([rank, ~rank, lowest])()
    sent_for_largest, counting.sent = counting.sent, []
    gathered = circle.start_gather([rank * 10, -1])()
    sent_for_gather = list(counting.sent)
    first = circle.start_largest([rank])  # begun first, ended last
    second = circle.start_gather([rank])()
    overlapping = first(), second
    end_group(group)
    return largest, gathered, sent_for_largest, sent_for_gather, overlapping


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_knows_the_same_after_as_many_bytes_as_the_formula_says(world_size: int) -> None:
    everyone = run_ranks(world_size, around)
    ranks = range(world_size)
    for largest, gathered, sent_for_largest, sent_for_gather, overlapping in everyone:
        assert largest == (world_size - 1, ~0, -(2**63))
        assert gathered == [(rank * 10, -1) for rank in ranks]
        assert overlapping == ((world_size - 1,), [(rank,) for rank in ranks])
        assert len(sent_for_largest) == len(sent_for_gather) == len(distances(world_size))
        assert sum(sent_for_largest) == bytes_of_largest(world_size, 3)
        assert sum(sent_for_gather) == bytes_of_gather(world_size, 2)


def _benchmark() -> Any:
    path = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "control_plane.py"
    spec = importlib.util.spec_from_file_location("control_plane", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_what_a_rank_sends_for_an_agreement_grows_with_the_logarithm_of_the_ranks() -> None:
    model = _benchmark()
    assert [len(model.agreement(n)) for n in (2, 4, 8, 16, 8192)] == [1, 2, 3, 4, 13]
    assert [sum(m.nbytes for m in model.agreement(n)) for n in (8, 8192)] == [96, 416]
    # With a message of 50 us and one late rank, the last rank is done one way through the circle after the late one began.
    assert model.simulate(model.agreement(8192), 8192, 50e-6, 0.0, late=17) == pytest.approx(1e-3 + 13 * 50e-6)
    assert model.simulate(model.ring_all_gather(64), 64, 50e-6, 0.0) == pytest.approx(63 * 50e-6)

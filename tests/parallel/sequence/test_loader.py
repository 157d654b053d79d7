"""The loader adapter: other samples on each rank become parts of the same samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter
from deepspeed.utils.errors import DeepSpeedError
from tests.harness import run_ranks

Batch = dict[str, Any]


def batch(start: int, length: int = 6, **more: Any) -> Batch:
    """Two samples that count from `start`."""
    ids = torch.arange(start, start + 2 * length).view(2, length)
    return {"input_ids": ids, "position_ids": torch.arange(length).expand(2, -1), "labels": ids, **more}


def adapter(loader: Any, rank: int, world: int) -> UlyssesSPDataLoaderAdapter:
    """Over all ranks."""
    return UlyssesSPDataLoaderAdapter(loader, rank, dist.group.WORLD, world, torch.device("cpu"))


def go_through(rank: int, world: int) -> tuple[int, list[Batch], int]:
    """Length, all of the first epoch, and the number of steps of the second."""
    loader = [batch(100 * rank, 6, name=f"a{rank}"), batch(100 * rank + 50, 8 if rank else 4, name=f"b{rank}")]
    loader += [batch(0)] * rank  # the second rank has one more, which is dropped
    parts = adapter(loader, rank, world)
    epoch = list(parts)
    return len(parts), epoch, len(list(parts))


def test_each_step_has_a_part_of_the_same_samples_on_every_rank() -> None:
    (length, first, second_epoch), (_, second, _) = run_ranks(2, go_through)
    assert (length, len(first), second_epoch) == (4, 4, 4)
    assert [part["name"] for part in first] == ["a0", "a1", "b0", "b1"] == [part["name"] for part in second]
    for mine, theirs, whole in zip(first, second, [batch(0), batch(100), batch(50, 4), batch(150, 8)], strict=True):
        assert torch.equal(torch.cat([mine["input_ids"], theirs["input_ids"]], 1), whole["input_ids"])
        targets = torch.cat([whole["labels"][:, 1:], torch.full((2, 1), -100)], 1)
        assert torch.equal(torch.cat([mine["shift_labels"], theirs["shift_labels"]], 1), targets)
        assert "labels" not in mine
        assert mine["input_ids"].device.type == "cpu"


def refuse(rank: int, world: int) -> list[str]:
    """What every rank says where the second one's batch, or both, cannot be cut."""
    without = {key: value for key, value in batch(0).items() if key != "position_ids"}
    bad = [
        without,
        batch(0, 5),
        batch(0, extra=torch.zeros(2, 6, 3)),
        {key: value[:1] for key, value in batch(0).items()},
    ]
    said = []
    for each in bad:
        with pytest.raises(DeepSpeedError) as error:
            next(adapter([each if rank else batch(0)], rank, world))
        said.append(str(error.value))
    return said


def test_a_batch_that_cannot_be_cut_is_refused_on_every_rank() -> None:
    for without, odd, deep, fewer in run_ranks(2, refuse):
        assert "Ulysses SP requires `position_ids`" in without
        assert "isn't divisible by sp-size 2" in odd
        assert "`extra` is (2, 6, 3)" in deep
        assert "different sizes: [1, 2]" in fewer

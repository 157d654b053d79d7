"""The data loader that `initialize(training_data=...)` and `engine.deepspeed_io` make."""

from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler, TensorDataset

import deepspeed
from deepspeed.engine.data import DeepSpeedDataLoader
from deepspeed.utils.errors import DeepSpeedError
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import build

DATASET = TensorDataset(torch.arange(22))


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(10**9))


def epoch_of(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def loaders(rank: int, world_size: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with engine_of(build("mlp"), make_config(1, micro=3), training_data=DATASET) as engine:
        loader = engine.training_dataloader
        assert isinstance(loader, DeepSpeedDataLoader) and isinstance(loader, deepspeed.DeepSpeedDataLoader)
        seen["len"] = len(loader)
        seen["epochs"] = [epoch_of(loader), epoch_of(loader)]
        seen["eval"] = epoch_of(engine.deepspeed_io(DATASET, route="eval"))
        seen["sampler"] = epoch_of(engine.deepspeed_io(DATASET, batch_size=11, data_sampler=SequentialSampler(DATASET)))
        collate = engine.deepspeed_io(
            list(range(12)), collate_fn=lambda items: [torch.tensor(items) * 10], route="eval"
        )
        seen["collate"] = epoch_of(collate)
        seen["endless"] = next(iter(engine.deepspeed_io(Endless()))).tolist()
        repeating = deepspeed.utils.RepeatingLoader(engine.deepspeed_io(DATASET, route="eval"))
        seen["repeating"] = [next(repeating)[0].tolist() for _ in range(len(loader) + 1)]
        with pytest.raises(ValueError, match="training_data is a int: neither a map-style nor an iterable dataset"):
            engine.deepspeed_io(3)
    with pytest.raises(DeepSpeedError, match="training_data is a float: neither"):
        deepspeed.initialize(model=build("mlp"), config=make_config(1, micro=3), training_data=0.5)
    with engine_of(build("mlp"), make_config(1, micro=3, dataloader_drop_last=True), training_data=DATASET) as engine:
        seen["drop_last"] = [len(batch) for batch in epoch_of(engine.training_dataloader)]
    return seen


def test_loaders_deal_samples_over_the_ranks_and_reshuffle_every_epoch() -> None:
    first, second = run_ranks(2, loaders)
    assert first["len"] == second["len"] == 4
    for mine, theirs in zip(first["epochs"], second["epochs"], strict=True):
        assert sorted(functools.reduce(operator.iadd, mine, []) + functools.reduce(operator.iadd, theirs, [])) == list(
            range(22)
        )
        assert [len(batch) for batch in mine] == [3, 3, 3, 2]
    assert first["epochs"][0] != first["epochs"][1]
    assert functools.reduce(operator.iadd, first["eval"], []) == list(range(0, 22, 2)) and functools.reduce(
        operator.iadd, second["eval"], []
    ) == list(range(1, 22, 2))
    assert first["sampler"] == second["sampler"] == [list(range(11)), list(range(11, 22))]
    assert first["collate"] == [[0, 20, 40], [60, 80, 100]]
    assert first["endless"] == [0, 1, 2]
    assert first["repeating"][-1] == first["repeating"][0]
    assert first["drop_last"] == [3, 3, 3]

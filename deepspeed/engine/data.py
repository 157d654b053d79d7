"""The data loader that `initialize(training_data=...)` and `engine.deepspeed_io` make.

A thin layer on torch's DataLoader: batches of this rank's micro-batch size, samples dealt over the data-parallel
ranks, and a new epoch's order each time it is iterated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler


class DeepSpeedDataLoader:
    """Batches of one rank. `len` is the number of batches of an epoch, where the dataset has a length.

    A map-style dataset without `data_sampler` is sampled by a DistributedSampler over the data-parallel ranks, shuffled
    if `shuffle`, whose epoch advances with every iteration. An iterable dataset deals itself.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        pin_memory: bool = False,
        local_rank: int = -1,
        tput_timer: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
        data_sampler: Sampler | None = None,
        data_parallel_world_size: int = 1,
        data_parallel_rank: int = 0,
        dataloader_drop_last: bool = False,
        shuffle: bool = True,
    ) -> None:
        is_iterable = isinstance(dataset, IterableDataset)
        if data_sampler is None and not is_iterable:
            data_sampler = DistributedSampler(
                dataset, data_parallel_world_size, data_parallel_rank, shuffle=shuffle, drop_last=dataloader_drop_last
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.data_sampler = data_sampler
        self.epoch = 0
        self.loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=None if is_iterable else data_sampler,
            collate_fn=collate_fn,
            num_workers=num_local_io_workers or 0,
            pin_memory=pin_memory and torch.accelerator.is_available(),
            drop_last=dataloader_drop_last,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.data_sampler, DistributedSampler):
            self.data_sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iter(self.loader)


class RepeatingLoader:
    """Iterates a loader for ever, starting it again when it ends."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._iterator = iter(loader)

    def __iter__(self) -> RepeatingLoader:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
            return next(self._iterator)

"""The data loader that `initialize(training_data=...)` and `engine.deepspeed_io` make.

A thin layer on torch's DataLoader: batches of this rank's micro-batch size, samples dealt over the data-parallel
ranks, and a new epoch's order each time it is iterated.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
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
        """Epochs begun."""
        self.num_taken = 0
        """Batches taken from the current epoch."""
        self._num_to_skip = 0
        self._loads = 0
        self._world_size = data_parallel_world_size
        self._seed = torch.initial_seed() % 2**62
        self._epoch_rng = torch.random.get_rng_state()
        self.loader = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=None if is_iterable else data_sampler,
            collate_fn=collate_fn,
            num_workers=num_local_io_workers or 0,
            pin_memory=pin_memory and torch.accelerator.is_available(),
            drop_last=dataloader_drop_last,
            # Its own, so that beginning an epoch does not change what the model draws next (dropout).
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return _Epoch(self)

    # Position, for checkpoints. ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the current epoch stands, and what its order was drawn from."""
        return {
            "epoch": self.epoch,
            "num_taken": self.num_taken,
            "batch_size": self.batch_size,
            "world_size": self._world_size,
            "seed": self._seed,
            "epoch_rng": self._epoch_rng,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there: the next batch taken, also from an iterator that exists already, is the one that would have come.

        With other batch sizes or numbers of ranks: as many samples further, rounded down to whole batches.
        """
        samples = state["num_taken"] * state["batch_size"] * state["world_size"]
        self.epoch = state["epoch"]
        self._seed, self._epoch_rng = state["seed"], state["epoch_rng"]
        self._num_to_skip = samples // (self.batch_size * self._world_size)
        with contextlib.suppress(TypeError):  # an iterable dataset without a length
            self._num_to_skip = self._num_to_skip if self._num_to_skip < len(self) else 0
        self.num_taken = self._num_to_skip
        self._loads += 1

    def _start_epoch(self) -> Iterator[Any]:
        """The batches of the next epoch, or the rest of the one that was loaded."""
        skip, self._num_to_skip = self._num_to_skip, 0
        if skip == 0:
            self.epoch += 1
            self.num_taken = 0
            self._epoch_rng = torch.random.get_rng_state()
        if isinstance(self.data_sampler, DistributedSampler):
            self.data_sampler.set_epoch(self.epoch - 1)
        self.loader.generator.manual_seed(self._seed + self.epoch)
        if skip == 0:
            return iter(self.loader)
        now = torch.random.get_rng_state()
        torch.random.set_rng_state(self._epoch_rng)  # a sampler may draw the order from it
        try:
            return self._after(skip)
        finally:
            torch.random.set_rng_state(now)

    def _after(self, skip: int) -> Iterator[Any]:
        """The batches after the first `skip`. Those are loaded and dropped where workers or an iterable dataset have states
        that follow from them; else only their indices are drawn."""
        if self.loader.num_workers or isinstance(self.dataset, IterableDataset):
            batches = iter(self.loader)
            collections.deque(itertools.islice(batches, skip), maxlen=0)
            return batches
        assert self.loader.batch_sampler is not None, "batches have a size"
        indices = iter(self.loader.batch_sampler)
        collections.deque(itertools.islice(indices, skip), maxlen=0)
        return map(self._load, indices)

    def _load(self, indices: list[Any]) -> Any:
        """One batch, as torch's loader makes it in this process."""
        many = getattr(self.dataset, "__getitems__", None)
        batch = self.loader.collate_fn(many(indices) if many else [self.dataset[i] for i in indices])
        return torch.utils.data._utils.pin_memory.pin_memory(batch) if self.loader.pin_memory else batch


class _Epoch:
    """One epoch's iterator. Starts at the first batch, so that a position loaded before then holds, and starts again
    where a position is loaded later."""

    def __init__(self, loader: DeepSpeedDataLoader) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._loads = loader._loads

    def __iter__(self) -> _Epoch:
        return self

    def __next__(self) -> Any:
        loader = self._loader
        if self._batches is None or self._loads != loader._loads:
            self._loads = loader._loads
            self._batches = loader._start_epoch()
        batch = next(self._batches)
        loader.num_taken += 1
        return batch


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

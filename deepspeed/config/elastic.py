"""Batch sizes that stay the same over many numbers of GPUs. Pure arithmetic over the `elasticity` section.

Called by `Config.batch_sizes` for training and by `deepspeed.elasticity` for users and schedulers.

A batch B can be trained by n GPUs if some micro-batch m gives B = m * n * accumulation. So the more divisors B / m has,
the more GPU counts fit; highly composite numbers have the most. Candidates are each micro-batch, and the least common
multiple of all, times the largest highly composite number that keeps them under the cap.

Version 0.2 does the same with whole nodes in place of GPUs, and where the present size does not fit the best batch, it
takes the batch that fits this size alone.

Source: the public description of the original's elasticity v0.1 and v0.2; Ramanujan's highly composite numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deepspeed.config.tuning import ElasticityConfig
from deepspeed.utils.errors import ElasticityConfigError, ElasticityIncompatibleWorldSize

HIGHLY_COMPOSITE = (
    *(1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120, 20160),
    *(25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400, 665280, 720720),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticBatch:
    """What an elastic configuration comes to."""

    batch: int
    """Samples per step."""
    valid_sizes: Sequence[int]
    """Numbers of data-parallel ranks that can train it."""
    micro: int
    """The largest micro-batch for the present size; without one, the largest that divides the batch."""


def elastic_batch(config: ElasticityConfig, world_size: int = 0) -> ElasticBatch:
    """The batch for a configuration. `world_size` counts all ranks; 0 where it is not known (version 0.1 only).

    Raises ElasticityIncompatibleWorldSize where no batch fits it, ElasticityConfigError where there is no batch at all.
    """
    if config.version == 0.1:
        return _over_gpus(config, world_size)
    return _over_nodes(config, world_size)


def _over_gpus(config: ElasticityConfig, world_size: int) -> ElasticBatch:
    batch, sizes = best_batch(config, config.max_train_batch_size, config.min_gpus, config.max_gpus)
    if world_size > 0 and world_size not in sizes:
        raise ElasticityIncompatibleWorldSize(
            f"{world_size} GPUs cannot train an elastic batch of {batch} samples.\n"
            f"  Use one of {_listed(sizes)} GPUs, or change elasticity.micro_batch_sizes."
        )
    return ElasticBatch(batch=batch, valid_sizes=sizes, micro=_micro(config, batch, world_size or 1))


def _over_nodes(config: ElasticityConfig, world_size: int) -> ElasticBatch:
    per_node, parallel = config.num_gpus_per_node, config.model_parallel_size
    if parallel > 1 and per_node % parallel:
        raise ElasticityConfigError(
            f"elasticity.num_gpus_per_node = {per_node} is not a multiple of model_parallel_size = {parallel}.\n"
            "  A copy of the model has to fit a whole number of times into a node."
        )
    replicas = per_node // parallel
    nodes = (max(1, config.min_gpus // per_node), max(1, config.max_gpus // per_node))
    batch, sizes = best_batch(config, config.max_train_batch_size // replicas, *nodes)
    batch, sizes = batch * replicas, [size * replicas for size in sizes]
    size = world_size // parallel
    if size in sizes:
        return ElasticBatch(batch=batch, valid_sizes=sizes, micro=_micro(config, batch, size))
    fitting = [
        config.max_train_batch_size // (micro * size) * micro * size for micro in config.micro_batch_sizes if size
    ]
    fitting = [candidate for candidate in fitting if candidate]
    if not fitting:
        raise ElasticityIncompatibleWorldSize(
            f"{world_size} GPUs need more samples per step than elasticity.max_train_batch_size = "
            f"{config.max_train_batch_size}.\n  Use one of {_listed(sizes)} data-parallel ranks, or raise the limit."
        )
    batch = max(fitting) if config.prefer_larger_batch else min(fitting)
    return ElasticBatch(batch=batch, valid_sizes=[size], micro=_micro(config, batch, size))


def best_batch(config: ElasticityConfig, cap: int, least: int, most: int) -> tuple[int, list[int]]:
    """The batch up to `cap` that the most sizes in [least, most] can train, and those sizes."""
    found = {batch: valid_sizes(batch, config.micro_batch_sizes, least, most) for batch in _candidates(config, cap)}
    found = {batch: sizes for batch, sizes in found.items() if sizes}
    if not found:
        raise ElasticityConfigError(
            f"no elastic batch up to {cap} fits micro-batches {list(config.micro_batch_sizes)} and {least} to {most} GPUs "
            "or nodes.\n  Raise elasticity.max_train_batch_size, or lower micro_batch_sizes or min_gpus."
        )
    sign = 1 if config.prefer_larger_batch else -1
    batch = max(found, key=lambda batch: (len(found[batch]), sign * batch))
    return batch, found[batch]


def _candidates(config: ElasticityConfig, cap: int) -> set[int]:
    bases = {*config.micro_batch_sizes, math.lcm(*config.micro_batch_sizes)}
    factors = {base: max((n for n in HIGHLY_COMPOSITE if n <= cap // base), default=0) for base in bases}
    return {base * factor for base, factor in factors.items() if factor}


def valid_sizes(batch: int, micro_batches: Sequence[int], least: int, most: int) -> list[int]:
    """All n in [least, most] such that some micro-batch divides the batch into n equal parts."""
    wholes = [batch // micro for micro in micro_batches if batch % micro == 0]
    return sorted({n for whole in wholes for n in _divisors(whole) if least <= n <= most})


def _divisors(number: int) -> set[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return {*small, *(number // n for n in small)}


def _micro(config: ElasticityConfig, batch: int, size: int) -> int:
    return max((m for m in config.micro_batch_sizes if batch // size % m == 0), default=0)


def _listed(sizes: Sequence[int]) -> str:
    shown = ", ".join(map(str, sizes[:24]))
    return f"{shown}, ... {sizes[-1]}" if len(sizes) > 24 else shown

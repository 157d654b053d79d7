"""Batch sizes: from what the configuration gives to the three numbers, and how to mend it where they disagree.

Called by the engine, once the number of data-parallel ranks is known. Arithmetic, and one warning.

    train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data-parallel world size

    given                     computed
    all three                 nothing; only checked
    train, micro              accumulation = train // micro // world
    train, accumulation       micro = train // world // accumulation
    micro, accumulation       train = micro * accumulation * world
    train                     accumulation = 1, micro = train // world
    micro                     accumulation = 1, train = micro * world
    accumulation or nothing   an error

Ranks that share layers read the same samples, so they count once. Libraries that know nothing of them (the Hugging Face Trainer)
count every rank: where all three are given and fit that way, `train` is divided by the ranks that share, with a warning.

Invariant: a `BatchSizes` satisfies the equation, and all its numbers are positive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
KEYS = (TRAIN, MICRO, ACCUMULATION)

Given = int | Literal["auto"] | None
"""A batch key as the configuration has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSizes:
    """The three sizes of a run, and where each came from."""

    train: int
    """Samples per step, over all data-parallel ranks."""
    micro: int
    """Samples per rank in one forward and backward."""
    accumulation: int
    """Micro-batches per step."""
    origins: Mapping[str, str]
    """For each key, and for "data-parallel world size": "given", "computed", "default", or who said so."""


def resolve_batch(
    train: Given, micro: Given, accumulation: Given, *, data_parallel_size: int, size_source: str, num_sharers: int = 1
) -> BatchSizes:
    """Compute what is not given and check the rest. `size_source` says in errors who counted the ranks, `num_sharers` how many
    of them share a model's layers beside each that is counted.

    Raises DeepSpeedConfigError with every number, its origin, and the cure.
    """
    given = {key: _checked(key, value) for key, value in zip(KEYS, (train, micro, accumulation), strict=True)}
    sizes = _complete(given[TRAIN], given[MICRO], given[ACCUMULATION], data_parallel_size)
    origins = {key: "computed" if value is None else "given" for key, value in given.items()}
    if accumulation is None and None in (train, micro):
        origins[ACCUMULATION] = "default"
    origins["data-parallel world size"] = size_source
    if (
        None not in given.values()
        and num_sharers > 1
        and sizes[0] == sizes[1] * sizes[2] * data_parallel_size * num_sharers
    ):
        sizes = (sizes[0] // num_sharers, *sizes[1:])
        origins[TRAIN] = f"given as {sizes[0] * num_sharers}, {num_sharers} times: by every rank that shares layers"
        warn_once(
            f"{TRAIN} = {sizes[0] * num_sharers} counts each of the {num_sharers} ranks that share layers, which read the same "
            f"samples: a step has {sizes[0]}."
        )
    if 0 in sizes or sizes[0] != sizes[1] * sizes[2] * data_parallel_size:
        raise DeepSpeedConfigError(_disagreement(sizes, data_parallel_size, origins))
    return BatchSizes(train=sizes[0], micro=sizes[1], accumulation=sizes[2], origins=origins)


_ORIGIN_WORDS = {"computed": "computed from the others", "default": "default, not given"}


def _checked(key: str, value: Given) -> int | None:
    if value == "auto":
        raise DeepSpeedConfigError(
            f'{key} = "auto" was never replaced by a number.\n'
            "  The Hugging Face Trainer and Accelerate's prepare() replace it before they call "
            "deepspeed.initialize; in a script that calls it itself, give a number."
        )
    if value is not None and value < 1:
        raise DeepSpeedConfigError(f"{key} = {value} is too small.\n  It must be at least 1.")
    return value


def _complete(train: int | None, micro: int | None, accumulation: int | None, world: int) -> tuple[int, int, int]:
    """The table of this file's docstring."""
    if train is not None and micro is not None:
        return train, micro, train // micro // world if accumulation is None else accumulation
    if micro is not None:
        return micro * (accumulation or 1) * world, micro, accumulation or 1
    if train is not None:
        return train, train // world // (accumulation or 1), accumulation or 1
    alone = f"{ACCUMULATION} = {accumulation} alone does not say how large a batch is"
    nothing = "the configuration gives no batch size"
    raise DeepSpeedConfigError(
        f"Either {TRAIN} or {MICRO} needs to be provided: {nothing if accumulation is None else alone}.\n"
        f"  Give {MICRO} (samples one rank takes at a time), or {TRAIN} (samples per step over all ranks)."
    )


def _disagreement(sizes: tuple[int, int, int], world: int, origins: Mapping[str, str]) -> str:
    train, micro, accumulation = sizes
    shown = dict(zip(origins, (*sizes, world), strict=True))
    lines = [
        "Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * "
        f"world_size {train} != {micro} * {accumulation} * {world}",
        *(f"  {name} = {value} ({_ORIGIN_WORDS.get(origins[name], origins[name])})" for name, value in shown.items()),
        f"  {_cure(sizes, world, origins)}",
    ]
    if world == 1:
        lines.append("  If several processes should train, start them with `deepspeed script.py` or torchrun.")
    return "\n".join(lines)


def _cure(sizes: tuple[int, int, int], world: int, origins: Mapping[str, str]) -> str:
    train, micro, accumulation = sizes
    per_step = micro * accumulation * world
    if "computed" not in (origins[MICRO], origins[ACCUMULATION]):
        return f"Set {TRAIN} to {per_step}, or remove one of the three keys to have it computed."
    unit = world * (micro if origins[ACCUMULATION] == "computed" else accumulation)
    below = train // unit * unit
    choices = " or ".join(str(size) for size in (below, below + unit) if size)
    return f"{TRAIN} must be a multiple of {unit}: set it to {choices}, or change another of the numbers."

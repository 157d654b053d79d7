"""Who writes what several model-parallel ranks hold, and what has to be stored apart because nobody knows its place.

Used by `save` where the model is divided (tensor, pipeline parallelism); data-parallel ranks share a flat by arithmetic
alone (`subject.shares`). All ranks tell what they hold; from equal answers all work out equal plans.

    held under one name             with                      then
    by one rank                     -                         it writes
    by several                      different boxes           each writes its own
    by several                      the same box and bytes    one of them writes: the one that has least to write so far
    by several                      boxes that overlap,       each writes its own, under a name of its own
                                    or other bytes

The last row is a model whose author did not mark what is cut (a user's `mpu`): nothing of it may be lost.

Invariant: every (name, box) is written by exactly one model-parallel position, and none that differs is dropped.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from deepspeed.checkpoint.boxes import Box, num_common
from deepspeed.checkpoint.ranks import Ranks
from deepspeed.checkpoint.subject import Subject
from deepspeed.zero.checkpoint_flats import Flat, weights

CHUNK = 1 << 22
"""Elements digested at a time."""

Digest = tuple[tuple[int, int, int], ...]
"""(first element, number, checksum) of the intervals that a rank holds of a tensor."""


class Holding(NamedTuple):
    """What a rank holds under a name."""

    whole: tuple[int, ...]
    dtype: str
    box: Box | None
    numel: int
    digest: Digest


def holdings(subject: Subject) -> dict[str, Holding]:
    """What this rank holds of parameters and buffers, by their names in the whole model."""
    digests: dict[str, list[tuple[int, int, int]]] = {}
    for flat in weights(subject.built, subject.module, subject.mesh):
        for span in flat.spans:
            if subject.box_of(span.name).box is None:
                held = digests.setdefault(subject.name_of(span.name), [])
                held.append((span.in_param, span.numel, _checksum(flat, span.at, span.numel)))
    found = {}
    for name, info in subject.parameters().items():
        box = subject.boxes().get(name)
        numel = box.numel if box is not None else _numel(info.shape)
        found[name] = Holding(info.shape, info.dtype, box, numel, tuple(sorted(digests.get(name, []))))
    for name, buffer in subject.buffers().items():
        sums = ((0, buffer.numel(), zlib.crc32(_bytes(buffer.detach().cpu().reshape(-1)))),)
        found[name] = Holding(tuple(buffer.shape), str(buffer.dtype), None, buffer.numel(), sums)
    return found


def _numel(shape: Iterable[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def _checksum(flat: Flat, start: int, numel: int) -> int:
    found = 0
    for at in range(0, numel, CHUNK):
        found = zlib.crc32(_bytes(flat.read(start + at, min(CHUNK, numel - at))), found)
    return found


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""


def share_out(subject: Subject, mine: Mapping[str, Holding], ranks: Ranks) -> Subject:
    """The subject, told what is stored apart and what others write. Collective over the job."""
    everyone = subject.mesh.gather_objects("model", dict(mine))
    # Other data-parallel ranks hold other intervals: what differs for one of them differs for all.
    conflicts = frozenset().union(*ranks.all(find_conflicts(everyone)))
    kept = [{name: held for name, held in theirs.items() if name not in conflicts} for theirs in everyone]
    return replace(subject, apart=conflicts, elsewhere=assign(kept)[subject.mesh.rank("model")])


def find_conflicts(everyone: Sequence[Mapping[str, Holding]]) -> frozenset[str]:
    """Names under which ranks hold what cannot be one tensor."""
    by_name: dict[str, list[Holding]] = {}
    for theirs in everyone:
        for name, held in theirs.items():
            by_name.setdefault(name, []).append(held)
    return frozenset(
        name
        for name, holders in by_name.items()
        if any(_differ(first, second) for i, first in enumerate(holders) for second in holders[i + 1 :])
    )


def _differ(first: Holding, second: Holding) -> bool:
    if first.whole != second.whole or first.dtype != second.dtype:
        return True
    if first.box != second.box:
        return num_common(first.box, second.box, first.whole) > 0
    # Where ZeRO cut otherwise, the checksums are of other elements, and say nothing.
    same_cut = [held[:2] for held in first.digest] == [held[:2] for held in second.digest]
    return same_cut and first.digest != second.digest


def assign(everyone: Sequence[Mapping[str, Holding]]) -> list[frozenset[str]]:
    """For each model-parallel rank the names that it holds and another one writes: large ones first, each to the holder
    that has least to write."""
    holders: dict[tuple[str, Box | None], list[int]] = {}
    for rank, theirs in enumerate(everyone):
        for name, held in theirs.items():
            holders.setdefault((name, held.box), []).append(rank)
    load = [0] * len(everyone)
    elsewhere: list[set[str]] = [set() for _ in everyone]
    numel = {key: everyone[ranks[0]][key[0]].numel for key, ranks in holders.items()}
    for key in sorted(holders, key=lambda key: (len(holders[key]) > 1, -numel[key], key[0])):
        writer = min(holders[key], key=lambda rank: load[rank])
        load[writer] += numel[key]
        for rank in holders[key]:
            if rank != writer:
                elsewhere[rank].add(key[0])
    return [frozenset(names) for names in elsewhere]

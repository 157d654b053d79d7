"""What ranks have alike and nobody compares: the bytes of parameters that are whole on each, and the settings of groups.

Held by `zero.facts`. `param.data.mul_(2)` on one rank goes past torch's version counters, and a learning rate that one rank
alone changed is just a number: ranks would train different weights from then on. So each rank keeps a *print* of what the
last step left, sums over samples of its bytes, and what does not match it any more is compared between ranks, parameter by
parameter (`zero.takeover`). Settings are digested once in so many steps.

    every whole bucket    up to SAMPLES words of 8 bytes, evenly over its length, after each step the next ones: bulk
                          writes show at once, any write into a bucket of that size or less too, and a write of a few
                          elements that is made again and again when its turn has come
    the same, all bytes   once in so many steps (`digest`): where every rank steps the whole, what one of them has written
                          alone stays there; elsewhere what it writes again in every step is seen then

Invariant: nothing is changed here, and no host waits for a device but in `written` and `digest`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from deepspeed.zero.bucket import Bucket

SAMPLES = 2**13
"""Words that are added up of one bucket, in some microseconds."""


@final
class Prints:
    """Of buckets that are whole on every rank; see the module's text."""

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        """Which it knows."""
        self._words: list[Tensor] = []
        self._samples: list[Tensor] = []
        self._before: Tensor | None = None
        self._turn, self._num_sampled = 0, SAMPLES

    def watch(self, buckets: Sequence[Bucket], share: int = 1) -> None:
        """From now on of these. share: one in so many words of a sample will do, because all are compared now and then."""
        self._num_sampled = SAMPLES // share
        self.buckets = [bucket for bucket in buckets if bucket.layout.padded_numel]
        self._words = [bucket.full.detach().view(torch.int64) for bucket in self.buckets]  # padded to whole words
        self.renew()

    def renew(self) -> None:
        """The parameters are as they should be. Other words are sampled from now on."""
        self._turn += 1
        self._samples = [_sample(words, self._num_sampled, self._turn) for words in self._words]
        self._before = self._read()

    def are_broken(self) -> Tensor | None:
        """Per bucket, on the device: whether it was written since. None: nothing to compare."""
        now = self._read()
        return None if now is None or self._before is None else now != self._before

    def written(self) -> list[Bucket]:
        """The buckets that were written since. The host waits."""
        broken = self.are_broken()
        return [] if broken is None else [b for b, is_ in zip(self.buckets, broken.tolist(), strict=True) if is_]

    def digest(self) -> int:
        """One number for all bytes of all buckets. The host waits."""
        if not self._words or any(bucket.is_away for bucket in self.buckets):
            return 0
        return int(torch.stack([words.sum() for words in self._words]).sum())

    def _read(self) -> Tensor | None:
        if not self._samples or any(bucket.is_away for bucket in self.buckets):
            return None
        sums = [sample.sum(0, keepdim=True) for sample in self._samples]
        return torch.cat(sums) if len(sums) > 1 else sums[0]


def _sample(words: Tensor, num_sampled: int, turn: int) -> Tensor:
    if words.numel() <= SAMPLES:
        return words
    every = 1 + words.numel() // num_sampled | 1
    return words[turn % every :: every]


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, which ranks compare."""
    numbers = {key: _number(value) for key, value in group.items() if key != "params"}
    return {key: value for key, value in numbers.items() if value is not None}


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and value.device.type == "cpu" else None
    if isinstance(value, (list, tuple)):
        return tuple(value) if all(isinstance(one, (bool, int, float)) for one in value) else None
    return value if isinstance(value, (bool, int, float)) else None


def digest_of(groups: Sequence[Mapping[str, Any]]) -> int:
    """One number for the settings of all groups."""
    return zlib.crc32(repr([sorted(settings_of(group).items()) for group in groups]).encode())

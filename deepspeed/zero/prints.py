"""What ranks have alike and nobody compares: the bytes of parameters that are whole on each, and the settings of groups.

Held by `zero.facts`. `param.data.mul_(2)` on one rank goes past torch's version counters, and a learning rate that one rank
alone changed is just a number: ranks would train different weights from then on. So each rank keeps a *print* of what the
last step left, sums over samples of its bytes, and what does not match it any more is compared between ranks, parameter by
parameter (`zero.takeover`). Settings are digested once in so many steps.

    every whole bucket    up to SAMPLES words of 8 bytes, evenly over its length: bulk writes show, and so does any
                          write into a bucket of that size or less

Invariant: nothing is changed here, and no host waits for a device but in `written`.
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
        self._samples: list[Tensor] = []
        self._before: Tensor | None = None

    def watch(self, buckets: Sequence[Bucket]) -> None:
        """From now on of these."""
        self.buckets = [bucket for bucket in buckets if bucket.layout.padded_numel]
        self._samples = [_sample(bucket.full) for bucket in self.buckets]
        self.renew()

    def renew(self) -> None:
        """The parameters are as they should be."""
        self._before = self._read()

    def are_broken(self) -> Tensor | None:
        """Per bucket, on the device: whether it was written since. None: nothing to compare."""
        now = self._read()
        return None if now is None or self._before is None else now != self._before

    def written(self) -> list[Bucket]:
        """The buckets that were written since. The host waits."""
        broken = self.are_broken()
        return [] if broken is None else [b for b, is_ in zip(self.buckets, broken.tolist(), strict=True) if is_]

    def _read(self) -> Tensor | None:
        if not self._samples or any(bucket.is_away for bucket in self.buckets):
            return None
        return torch.stack([sample.sum() for sample in self._samples])


def _sample(full: Tensor) -> Tensor:
    words = full.detach().view(torch.int64)  # buckets are padded to whole words
    return words[:: 1 + words.numel() // SAMPLES | 1] if words.numel() > SAMPLES else words


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

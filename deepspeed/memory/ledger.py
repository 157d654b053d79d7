"""Bytes by kind and tier as a step goes on, and the moment when most were in use. Pure.

Written by `memory.replay`, read into an estimate. Every change is one `add`; the peak of a tier is the highest total it
ever had, with the kinds' shares and the phase at that moment.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from deepspeed.zero.policy import Tier

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer states"
UNSHARDED, BUCKETS, COMMUNICATION = "unsharded parameters", "gradient buckets", "communication"
ACTIVATIONS, TEMPORARIES, STREAMING = "activations", "temporaries", "streaming buffers"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, UNSHARDED, BUCKETS, COMMUNICATION, STREAMING, ACTIVATIONS, TEMPORARIES)
"""In the order in which they are stacked: what rests, what ZeRO moves, what the model computes."""

LARGE_BLOCK = 2**20
"""From here on torch's caching allocator hands out blocks in multiples of `LARGE_GRANULE`, below of `SMALL_GRANULE`."""
LARGE_GRANULE, SMALL_GRANULE = 2 * 2**20, 512


def granted(nbytes: int) -> int:
    """What a caching allocator sets aside for a block: rounded up to its granule."""
    granule = LARGE_GRANULE if nbytes >= LARGE_BLOCK else SMALL_GRANULE
    return -(-nbytes // granule) * granule


@dataclass
class Peak:
    """The highest total of one tier: bytes by kind then, in which phase, and what rounding of blocks adds."""

    nbytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    rounding_nbytes: int = 0


class Ledger:
    """Running totals. `phase` is written into the peaks."""

    def __init__(self) -> None:
        self.phase = "initialize"
        self.peaks: dict[Tier, Peak] = {tier: Peak() for tier in Tier}
        self.by_phase: dict[str, int] = {}
        """The device tier's highest total in each phase."""
        self._totals: Counter[Tier] = Counter()
        self._kinds: dict[Tier, Counter[str]] = {tier: Counter() for tier in Tier}
        self._rounding: Counter[Tier] = Counter()

    def add(self, kind: str, nbytes: int, tier: Tier = Tier.DEVICE, count: int = 1) -> None:
        """`count` blocks of `nbytes` come; negative counts: go."""
        self._totals[tier] += nbytes * count
        self._kinds[tier][kind] += nbytes * count
        self._rounding[tier] += (granted(nbytes) - nbytes) * count
        total, peak = self._totals[tier], self.peaks[tier]
        if tier is Tier.DEVICE and total > self.by_phase.get(self.phase, 0):
            self.by_phase[self.phase] = total
        if total > peak.nbytes:
            peak.nbytes, peak.phase = total, self.phase
            peak.by_kind = {name: size for name, size in self._kinds[tier].items() if size}
            peak.rounding_nbytes = self._rounding[tier]

    def drop(self, kind: str, nbytes: int, tier: Tier = Tier.DEVICE) -> None:
        """A block goes."""
        self.add(kind, nbytes, tier, -1)

    def of(self, kind: str, tier: Tier = Tier.DEVICE) -> int:
        """Bytes of a kind now."""
        return self._kinds[tier][kind]

"""The three places where bytes can rest between uses: their names.

Which bytes go where is a placing (`zero/placing.py`, from the configuration by `zero/tiers_from_config.py`); how a place keeps, loads and
stores them is a class in `tiers/rest.py`.
"""

from __future__ import annotations

import enum


class Tier(enum.Enum):
    """Where bytes rest between uses."""

    DEVICE = "device"
    """In the accelerator's memory; on a CPU-only machine, main memory."""
    CPU = "cpu"
    """In main memory, pinned where the device copies from there."""
    NVME = "nvme"
    """In files on a local disk."""

    @property
    def is_on_disk(self) -> bool:
        """Whether bytes here are files: nobody sees them without a read, and a read or a write may fail on one rank alone. What else
        follows from that is asked by this name; a tier of another kind of files needs no more than its line here."""
        return self is Tier.NVME

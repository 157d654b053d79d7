"""Where bytes rest when they are not in the device's memory: main memory, or files on a local disk."""

from deepspeed.tiers.rest import InMemory, OnDisk, Rest, Transfer
from deepspeed.tiers.tier import Tier

__all__ = ["InMemory", "OnDisk", "Rest", "Tier", "Transfer"]

"""Apple's GPU: one device, one queue as far as torch shows, memory shared with the CPU.

Chosen by `get_accelerator()` where torch has Metal. Source: the documentation of `torch.mps`.
"""

from __future__ import annotations

from typing import final

import psutil
import torch
from torch import Tensor

from deepspeed.accelerator.base import DeepSpeedAccelerator


@final
class MpsAccelerator(DeepSpeedAccelerator):
    """Metal through torch.mps. Peaks are not counted there, so the maximum is the present value."""

    def is_available(self) -> bool:
        """Whether torch was built with Metal and the system has it."""
        return torch.backends.mps.is_available()

    def device_count(self) -> int:
        """1 or 0."""
        return torch.mps.device_count()

    def set_device(self, device_index: int) -> None:
        """There is one."""

    def current_device(self) -> int:
        """0."""
        return 0

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for Metal's queue."""
        torch.mps.synchronize()

    def is_synchronized_device(self) -> bool:
        """Metal queues work."""
        return False

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        """Set the generator's state."""
        torch.mps.set_rng_state(new_state)

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        """The generator's state."""
        return torch.mps.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        """Seed the generator."""
        torch.mps.manual_seed(seed)

    def default_generator(self, device_index: int) -> torch.Generator:
        """The generator torch uses for Metal."""
        return torch.mps._get_default_mps_generator()

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Held by tensors."""
        return torch.mps.current_allocated_memory()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Held by tensors now."""
        return self.memory_allocated()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """No peak is counted."""

    def total_memory(self, device_index: int | None = None) -> int:
        """What Metal recommends a process to use at most."""
        return torch.mps.recommended_max_memory()

    def available_memory(self, device_index: int | None = None) -> int:
        """What the machine could give without swapping."""
        return int(psutil.virtual_memory().available)

    def empty_cache(self) -> None:
        """Give free blocks back to the system."""
        torch.mps.empty_cache()


ACCELERATOR = MpsAccelerator

"""The CPU as an accelerator: one device called "cpu", one queue, the process's memory as the operating system counts it.

Chosen by `get_accelerator()` where nothing else is present. Invariant: everything here works without any device.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import final

import psutil
import torch
from torch import Tensor

from deepspeed.accelerator.base import DeepSpeedAccelerator
from deepspeed.accelerator.platforms import cpu_device_count

_PROCESS = Path("/proc/self")


@final
class CpuAccelerator(DeepSpeedAccelerator):
    """Memory is that of the whole process (its resident set), since torch does not count CPU tensors."""

    def is_available(self) -> bool:
        """Always."""
        return True

    def device_count(self) -> int:
        """LOCAL_SIZE where a launcher set it, else the NUMA nodes that have cores."""
        return cpu_device_count(os.environ)

    def device_name(self, device_index: int | None = None) -> str:
        """ "cpu", whatever the index."""
        return "cpu"

    def set_device(self, device_index: int) -> None:
        """There is one."""

    def current_device(self) -> str:
        """ "cpu"."""
        return "cpu"

    def current_device_name(self) -> str:
        """ "cpu"."""
        return "cpu"

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing is asynchronous."""

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        """Set the state of torch's CPU generator."""
        torch.set_rng_state(new_state)

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        """The state of torch's CPU generator."""
        return torch.get_rng_state()

    def manual_seed(self, seed: int) -> None:
        """Seed torch's CPU generator."""
        torch.default_generator.manual_seed(seed)

    def default_generator(self, device_index: int) -> torch.Generator:
        """torch's CPU generator."""
        return torch.default_generator

    def memory_allocated(self, device_index: int | None = None) -> int:
        """The resident set of this process."""
        return int(psutil.Process().memory_info().rss)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The largest resident set since the last reset; where the system does not tell, the present one."""
        with contextlib.suppress(OSError):
            for line in (_PROCESS / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return self.memory_allocated()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Start the maximum anew, where the system lets a process do so."""
        reset_peak_resident_set = "5"  # proc_pid_clear_refs(5)
        with contextlib.suppress(OSError):
            (_PROCESS / "clear_refs").write_text(reset_peak_resident_set)

    def total_memory(self, device_index: int | None = None) -> int:
        """The machine's memory."""
        return int(psutil.virtual_memory().total)

    def available_memory(self, device_index: int | None = None) -> int:
        """What the machine could give without swapping."""
        return int(psutil.virtual_memory().available)


ACCELERATOR = CpuAccelerator

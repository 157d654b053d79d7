"""How much memory is in use, as one log line: `deepspeed.runtime.utils.see_memory_usage`."""

from __future__ import annotations

import psutil

from deepspeed.accelerator import get_accelerator
from deepspeed.utils.logging import current_rank, logger

GIB = 2**30


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log `message` with this moment's device and host memory, on rank 0; does nothing unless `force`.

    As a warning, because whoever forces it wants to see it.
    """
    if not force or current_rank() != 0:
        return
    accelerator, host = get_accelerator(), psutil.virtual_memory()
    logger.warning(
        "%s: device %.2f GiB (peak %.2f GiB), host %.2f GiB (%.0f %%)",
        message,
        accelerator.memory_allocated() / GIB,
        accelerator.max_memory_allocated() / GIB,
        host.used / GIB,
        host.percent,
    )

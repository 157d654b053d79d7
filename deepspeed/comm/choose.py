"""Which exchange a process group's buffers move by: the only place that decides."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from deepspeed.comm.collective import CollectiveExchange
from deepspeed.comm.direct import DirectExchange
from deepspeed.comm.exchange import Exchange
from deepspeed.comm.local import LocalExchange


def make_exchange(group: ProcessGroup | None, device: torch.device) -> Exchange:
    """The fastest exchange for buffers on `device`. None means all ranks, or this one where nothing is initialised."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return LocalExchange(None)
    group = group or dist.group.WORLD
    assert group is not None, "torch.distributed is initialised, so it has a default group"
    if group.size() == 1:
        return LocalExchange(group)
    if device.type == "cpu" and _backend_for(group, "cpu") == "gloo":
        return DirectExchange(group)
    return CollectiveExchange(group)


def _backend_for(group: ProcessGroup, device_type: str) -> str:
    config = dict(entry.split(":") for entry in str(dist.get_backend_config(group)).split(","))
    return config.get(device_type, "")

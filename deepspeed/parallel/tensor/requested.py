"""What `tp_model_init` was told, until `deepspeed.initialize` takes it: size, dtype and group.

One per process, as the contract has it; taking it clears it, so that a second engine does not inherit the first one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from deepspeed.utils.errors import DeepSpeedConfigError


@dataclass(frozen=True)
class Request:
    """One call's arguments."""

    size: int
    dtype: Any = None
    group: Any = None


@dataclass
class _Waiting:
    request: Request | None = None
    is_training: bool = False


_waiting = _Waiting()


def request(size: int, dtype: Any, group: Any) -> None:
    """Remember. Raises DeepSpeedConfigError (a ValueError) where an earlier call said otherwise."""
    if group is not None and dist.get_world_size(group) != size:
        raise DeepSpeedConfigError(
            f"tp_model_init(tp_size={size}, tp_group=...): the group has {dist.get_world_size(group)} ranks."
        )
    made, before = Request(size, dtype, group), _waiting.request
    if before is not None and (before.size, before.dtype) != (size, dtype):
        raise DeepSpeedConfigError(
            f"Conflicting tp_model_init arguments: tp_size {before.size} and dtype {before.dtype} before, now {size} and {dtype}.\n"
            "  Call it once for each deepspeed.initialize, or with the same arguments."
        )
    _waiting.request = made


def take() -> Request | None:
    """What is waiting, which then waits no more."""
    found, _waiting.request = _waiting.request, None
    return found


def set_autotp_mode(training: bool = False) -> None:
    """Whether layers that are made by hand are for training; `initialize` sets it where it cuts a model."""
    _waiting.is_training = training


def is_autotp_training_mode() -> bool:
    """What `set_autotp_mode` said last."""
    return _waiting.is_training

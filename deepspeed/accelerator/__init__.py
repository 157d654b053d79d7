"""One object that stands for the kind of device this process computes on: `get_accelerator()`.

Asked by every layer that needs a device, a stream, memory numbers, a dtype's support or a backend name. The object is
made on the first call, from DS_ACCELERATOR or by asking each platform of `platforms.PLATFORMS` in order, and stays.

    platforms.py   the table: names, backends, variables         (no torch: the launcher reads it)
    base.py        the whole surface; what all devices share
    device.py      any device with a module of its own in torch: cuda (also ROCm), xpu, npu, mlu, ...
    cpu.py, mps.py where torch has no such module, or a smaller one
    memory.py      memory in use, as a log line
    peak.py        operations per second, measured

Invariant: importing this package imports no torch and starts no device context; making the object starts no context.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from deepspeed.accelerator.platforms import PLATFORMS, UNNAMED, Platform, custom, override
from deepspeed.utils.errors import DeepSpeedError

if TYPE_CHECKING:
    from deepspeed.accelerator.base import DeepSpeedAccelerator

__all__ = ["DeepSpeedAccelerator", "get_accelerator", "is_current_accelerator_supported", "set_accelerator"]

_current: DeepSpeedAccelerator | None = None


def get_accelerator() -> DeepSpeedAccelerator:
    """The accelerator of this process: DS_ACCELERATOR's, else the first platform that has a device, else the CPU.

    Raises DeepSpeedError where DS_ACCELERATOR names no platform or one whose torch plugin is not installed.
    """
    global _current
    if _current is None:
        chosen = override(os.environ)
        _current = _first_present() if chosen is None else _make(chosen)
    return _current


def set_accelerator(accelerator: DeepSpeedAccelerator) -> None:
    """Use this object from now on."""
    global _current
    _current = accelerator


def is_current_accelerator_supported() -> bool:
    """Whether the accelerator in use is one of DS_ACCELERATOR's names."""
    return get_accelerator().name in PLATFORMS


def _first_present() -> DeepSpeedAccelerator:
    *vendors, cpu = PLATFORMS.values()
    candidates = (_make(platform) for platform in (*vendors, *_brought(), cpu) if _is_installed(platform))
    return next(candidate for candidate in candidates if candidate.is_available())


def _brought() -> list[Platform]:
    """The device that a package brought to torch as PrivateUse1, unless the table has it."""
    name = _private_use_name()
    is_known = name in {platform.device_type for platform in PLATFORMS.values()}
    return [] if name == UNNAMED or is_known else [custom(name)]


def _private_use_name() -> str:
    torch = importlib.import_module("torch")
    return str(torch._C._get_privateuse1_backend_name())


def _is_installed(platform: Platform) -> bool:
    if platform.plugin is None:
        return True
    return importlib.util.find_spec(platform.plugin.partition(".")[0]) is not None


def _make(platform: Platform) -> DeepSpeedAccelerator:
    if not _is_installed(platform):
        raise DeepSpeedError(
            f"DS_ACCELERATOR={platform.name} needs the package {platform.plugin}, which is not installed.\n"
            "  Install it, or unset DS_ACCELERATOR to have an accelerator found."
        )
    if platform.plugin is not None:
        importlib.import_module(platform.plugin)
    if platform.name not in PLATFORMS:
        platform = _complete(platform)
    own_module = platform.name if platform.name in ("cpu", "mps") else "device"
    module = importlib.import_module(f"deepspeed.accelerator.{own_module}")
    made: DeepSpeedAccelerator = module.ACCELERATOR(platform)
    return made


def _complete(platform: Platform) -> Platform:
    """The row of a device from outside of the table, with what torch knows of it."""
    if platform.name != _private_use_name() or not hasattr(importlib.import_module("torch"), platform.name):
        raise DeepSpeedError(
            f"DS_ACCELERATOR={platform.name} is neither one of {', '.join(PLATFORMS)} nor a device that torch was given: its "
            f"PrivateUse1 device is {_private_use_name()!r}.\n"
            f"  Import the package that brings {platform.name!r} and its module torch.{platform.name}, or unset DS_ACCELERATOR."
        )
    distributed = importlib.import_module("torch.distributed")
    backends = distributed.Backend.default_device_backend_map if distributed.is_available() else {}
    return custom(platform.name, backends.get(platform.name, ""))


def __getattr__(name: str) -> Any:
    if name == "DeepSpeedAccelerator":
        return importlib.import_module("deepspeed.accelerator.base").DeepSpeedAccelerator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""`AsyncIOBuilder` and `GDSBuilder`: the door through which scripts ask for file I/O.

Reached as `deepspeed.ops.op_builder` and `deepspeed.ops.aio`. In the original a builder compiles an extension at its first
`load()`; here everything was compiled with the package, and `load()` returns a module.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import final

from deepspeed.utils.errors import NotAvailableError


@final
class AsyncIOBuilder:
    """Loads `aio_handle` and its module functions."""

    NAME = "async_io"
    BUILD_VAR = "DS_BUILD_AIO"

    def load(self, verbose: bool = True) -> ModuleType:
        """The module with `aio_handle`."""
        return importlib.import_module("deepspeed.tiers.aio")

    def is_compatible(self, verbose: bool = False) -> bool:
        """Always: where nothing better exists, threads do it."""
        return True

    def absolute_name(self) -> str:
        """Where the module is."""
        return "deepspeed.tiers.aio"

    def sources(self) -> list[str]:
        """What was compiled with the package."""
        return ["csrc/aio.cpp"]


@final
class GDSBuilder:
    """Reads from disk straight to a GPU, where that exists: not in this version."""

    NAME = "gds"
    BUILD_VAR = "DS_BUILD_GDS"

    def load(self, verbose: bool = True) -> ModuleType:
        """Raises NotAvailableError."""
        raise NotAvailableError(
            "gds_handle: GPUDirect Storage needs CUDA and NVIDIA's cuFile library; this version does not use them.\n"
            "  Use AsyncIOBuilder().load().aio_handle: it takes tensors on a GPU too, through a buffer on the CPU."
        )

    def is_compatible(self, verbose: bool = False) -> bool:
        """Never."""
        return False

"""The simulated device "sim": `install()` makes it a device of torch in this process, with the module `torch.sim`.

For tests of everything that a CPU hides: tensors on the wrong device, missing copies, hidden synchronisations of the host,
missing waits between streams. Memory and operators are the CPU's, so numbers are the CPU's bit for bit; see
`csrc/device.cpp`. `reset(seed)` starts adversarial time: what is asynchronous happens as late as the rules allow, or early,
as the seed says. Without a seed it happens at once, but for collectives (`group.py`).

A second `install` does nothing. It cannot be undone: call it in processes that are for this (tests/device/ranks.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.device.build import library
from tests.device.graphs import SIMGraph, graph

NAME = "sim"
NUM_DEVICES = 8


@functools.lru_cache(maxsize=None)
def native() -> Any:
    """The library's C functions."""
    path = str(library())
    torch.ops.load_library(path)
    functions = ctypes.CDLL(path)
    functions.sim_failure.restype = ctypes.c_char_p
    functions.sim_counter.restype = functions.sim_memory.restype = ctypes.c_int64
    functions.sim_reset.argtypes = [ctypes.c_int64]
    functions.sim_drain.argtypes = [ctypes.c_int, ctypes.c_int64]
    return functions


def prepare() -> None:
    """Compile what `install` loads; ranks have less time to start than a compiler takes on a busy machine."""
    library()


@functools.lru_cache(maxsize=None)
def install() -> None:
    """Make "sim" a device of this process, and "sim" a backend of torch.distributed."""
    native().sim_install()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, SimModule(f"torch.{NAME}"))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    from tests.device.group import register

    register()


class SimModule(types.ModuleType):
    """`torch.sim`: what vendors' modules have, as torch.cuda has it."""

    Stream = torch.Stream
    Event = torch.Event
    SIMGraph = SIMGraph
    graph = graph

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _lazy_init(self) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return NUM_DEVICES

    def current_device(self) -> int:
        return int(torch._C._accelerator_getDeviceIndex())

    def set_device(self, device: Any) -> None:
        torch._C._accelerator_setDeviceIndex(_index(device))

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = self.current_device()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def synchronize(self, device: Any = None) -> None:
        torch.accelerator.synchronize(_index(device))

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(
            name="simulated", total_memory=self.mem_get_info(device)[1], multi_processor_count=1
        )

    # -- streams

    def current_stream(self, device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(_index(device))

    def default_stream(self, device: Any = None) -> torch.Stream:
        made: torch.Stream = torch.ops.sim.default_stream(_index(device))
        return made

    @contextlib.contextmanager
    def stream(self, stream: torch.Stream | None) -> Iterator[Any]:
        if stream is None:
            yield None
            return
        device, before = self.current_device(), self.current_stream(stream.device)
        torch.accelerator.set_stream(stream)
        try:
            yield stream
        finally:
            torch.accelerator.set_stream(before)
            self.set_device(device)

    # -- random numbers

    @functools.cached_property
    def default_generators(self) -> tuple[torch.Generator, ...]:
        return tuple(torch.ops.sim.default_generator(i) for i in range(self.device_count()))

    def manual_seed(self, seed: int) -> None:
        self.default_generators[self.current_device()].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.default_generators:
            generator.manual_seed(seed)

    def initial_seed(self) -> int:
        return self.default_generators[self.current_device()].initial_seed()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.default_generators[_index(device)].get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.default_generators[_index(device)].set_state(state)

    # -- memory

    def memory_allocated(self, device: Any = None) -> int:
        return self._memory(device)[0]

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._memory(device)[1]

    def memory_reserved(self, device: Any = None) -> int:
        return self._memory(device)[0]

    def max_memory_reserved(self, device: Any = None) -> int:
        return self._memory(device)[1]

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        native().sim_reset_peak(_index(device))

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        current, peak, total = self._memory(device)[:3]
        facts = {"current": current, "peak": peak, "allocated": total, "freed": 0}
        return {f"{kind}_bytes.all.{name}": n for kind in ("allocated", "reserved") for name, n in facts.items()}

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        current, _, _, most = self._memory(device)
        return most - current, most

    def _memory(self, device: Any) -> list[int]:
        """Bytes that are allocated, that were at most, that were in all, and that there are."""
        return [native().sim_memory(_index(device), which) for which in range(4)]

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _index(device: Any) -> int:
    if device is None or (isinstance(device, torch.device) and device.index is None):
        return int(torch._C._accelerator_getDeviceIndex())
    return device if isinstance(device, int) else int(torch.device(device).index or 0)


def reset(seed: int | None = None) -> None:
    """Finish everything and start anew: counters at zero, time in order, or adversarial as `seed` says (0: always late)."""
    native().sim_reset(-1 if seed is None else seed)


def check() -> None:
    """Raise what was found where nothing could be raised: memory that was freed under work of another stream."""
    if text := native().sim_failure().decode():
        raise RuntimeError(text)


@dataclass
class Waits:
    """Where the host waited for the device: the reason and the innermost lines of Python, in order."""

    sites: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sites)


_Listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_Skipper = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)

WAITS = ("stream.wait", "record_stream", "event.synchronize", "stream.synchronize", "device.synchronize")
"""What a program says so that one piece of work comes after another, or memory outlives it."""


@contextlib.contextmanager
def skipping(is_skipped: Callable[[str], bool]) -> Iterator[None]:
    """In the block the waits of `WAITS` do nothing where `is_skipped` says so, which is called with the kind of each."""

    @_Skipper
    def ask(kind: bytes) -> int:
        return int(is_skipped(kind.decode()))

    native().sim_skip(ask)
    try:
        yield
    finally:
        native().sim_skip(_Skipper())


@contextlib.contextmanager
def watched(root: str = "deepspeed") -> Iterator[Waits]:
    """Collects the host's synchronisations in the block."""
    waits = Waits()

    @_Listener
    def listen(why: bytes) -> None:
        frames = [f for f in traceback.extract_stack() if f"/{root}/" in f.filename and "/tests/" not in f.filename]
        last = (
            f"{frames[-1].filename.rpartition(f'/{root}/')[2]}:{frames[-1].lineno} {frames[-1].name}"
            if frames
            else "the caller"
        )
        waits.sites.append(f"{why.decode()} in {last}")

    native().sim_listen(listen)
    try:
        yield waits
    finally:
        native().sim_listen(_Listener())

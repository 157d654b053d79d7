"""Any accelerator whose vendor follows torch.cuda's module: cuda (also ROCm), xpu, npu, hpu, mlu, sdaa, supa, klxpu.

Made by `get_accelerator()` for every row of the table that has no class of its own. Each method is the function of the
same name in `torch.<device_type>`. Two kinds of differences: what is known without asking is in the row (`platforms.py`); a
function that not every vendor has is looked up (`_call`), and the method says what is answered in its absence.

Invariant: nothing is initialised until a method that needs the device is called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from types import ModuleType
from typing import Any, final

import torch
from torch import Tensor

from deepspeed.accelerator.base import DeepSpeedAccelerator


@final
class DeviceAccelerator(DeepSpeedAccelerator):
    """Devices with streams and their own memory."""

    @cached_property
    def _torch(self) -> Any:
        """The module torch.<device_type>."""
        return getattr(torch, self.platform.device_type)

    def _call(self, name: str, *args: Any, absent: Callable[[], Any]) -> Any:
        """The vendor's function of that name, in the module or in its `random`; what `absent` gives where there is none."""
        for place in (self._torch, getattr(self._torch, "random", None)):
            function = getattr(place, name, None)
            if function is not None:
                return function(*args)
        return absent()

    def _index(self, device_index: int | None) -> int:
        return self._torch.current_device() if device_index is None else device_index

    # -- device

    def is_available(self) -> bool:
        """Whether torch sees at least one."""
        return bool(self._torch.is_available()) and self.device_count() > 0

    def device_count(self) -> int:
        """How many torch sees; starts no context."""
        return int(self._torch.device_count())

    def set_device(self, device_index: int) -> None:
        """Make it the current device."""
        self._torch.set_device(device_index)

    def current_device(self) -> int:
        """The index of the current device."""
        return int(self._torch.current_device())

    def synchronize(self, device_index: int | None = None) -> None:
        """Wait for all streams of a device."""
        self._torch.synchronize(self._index(device_index))

    def is_synchronized_device(self) -> bool:
        """Work is queued."""
        return False

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """A context in which that device is the current one."""
        context: AbstractContextManager[Any] = self._torch.device(self._index(device_index))
        return context

    # -- random numbers

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        """Set the state of a device's generator."""
        index = self._index(device_index)
        self._call("set_rng_state", new_state, index, absent=lambda: self.default_generator(index).set_state(new_state))

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        """The state of a device's generator."""
        index = self._index(device_index)
        state: Tensor = self._call("get_rng_state", index, absent=lambda: self.default_generator(index).get_state())
        return state

    def manual_seed(self, seed: int) -> None:
        """Seed the current device's generator."""
        self._call("manual_seed", seed, absent=lambda: self.default_generator(self.current_device()).manual_seed(seed))

    def manual_seed_all(self, seed: int) -> None:
        """Seed every device's generator."""
        self._call("manual_seed_all", seed, absent=lambda: self.manual_seed(seed))

    def initial_seed(self) -> int:
        """The seed the current generator started from."""
        return int(
            self._call("initial_seed", absent=lambda: self.default_generator(self.current_device()).initial_seed())
        )

    def default_generator(self, device_index: int) -> torch.Generator:
        """A device's generator."""
        place = self._torch if hasattr(self._torch, "default_generators") else self._torch.random
        generator: torch.Generator = place.default_generators[device_index]
        return generator

    # -- streams and events

    def has_streams(self) -> bool:
        """Whether the vendor's module has them."""
        return hasattr(self._torch, "Stream")

    @property
    def Stream(self) -> Any:  # noqa: N802 - the contract's name
        """The vendor's stream class."""
        return self._torch.Stream

    @property
    def Event(self) -> Any:  # noqa: N802 - the contract's name
        """The vendor's event class."""
        return self._torch.Event

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which work is queued on `stream`."""
        context: AbstractContextManager[Any] = self._torch.stream(stream)
        return context

    def current_stream(self, device_index: int | None = None) -> Any:
        """The stream that work is queued on now."""
        return self._torch.current_stream(self._index(device_index))

    def default_stream(self, device_index: int | None = None) -> Any:
        """The device's first stream; where the vendor does not name it, the current one."""
        index = self._index(device_index)
        return self._call("default_stream", index, absent=lambda: self._torch.current_stream(index))

    def is_current_stream_capturing(self) -> bool:
        """Whether a graph is being captured."""
        return bool(self._call("is_current_stream_capturing", absent=bool))

    # -- memory

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Held by tensors."""
        return int(self._torch.memory_allocated(device_index))

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most held by tensors since the last reset."""
        return int(self._torch.max_memory_allocated(device_index))

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Held by the allocator; by tensors, where it tells no more."""
        return int(self._call("memory_reserved", device_index, absent=lambda: self.memory_allocated(device_index)))

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """The most held by the allocator since the last reset."""
        return int(
            self._call("max_memory_reserved", device_index, absent=lambda: self.max_memory_allocated(device_index))
        )

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Start the maxima anew."""
        self._torch.reset_peak_memory_stats(device_index)

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """The allocator's counters."""
        counted = super().memory_stats
        return dict(self._call("memory_stats", device_index, absent=lambda: counted(device_index)))

    def total_memory(self, device_index: int | None = None) -> int:
        """What the device has, by its properties, else its driver, else the allocator's limit."""
        index = self._index(device_index)
        of_properties = getattr(self._call("get_device_properties", index, absent=lambda: None), "total_memory", None)
        if of_properties is not None:
            return int(of_properties)
        return int(self._call("mem_get_info", index, absent=lambda: (0, self.memory_stats(index).get("Limit", 0)))[1])

    def available_memory(self, device_index: int | None = None) -> int:
        """Free on the device, plus what the allocator holds without a tensor in it."""
        index = self._index(device_index)
        (free, _) = self._call(
            "mem_get_info", index, absent=lambda: (self.total_memory(index) - self.memory_reserved(index), 0)
        )
        return int(free) + self.memory_reserved(index) - self.memory_allocated(index)

    def empty_cache(self) -> None:
        """Give free blocks back to the driver, where the vendor's allocator does so."""
        self._call("empty_cache", absent=lambda: None)

    # -- dtypes

    def is_bf16_supported(self) -> bool:
        """What the vendor's module says; yes where it says nothing."""
        return bool(self._call("is_bf16_supported", absent=lambda: True))

    def is_fp64_supported(self) -> bool:
        """What the table says, and the card where it says no: not all of Intel's have it."""
        if not self.platform.has_float64 or self.name != "xpu" or not self.is_available():
            return self.platform.has_float64
        return bool(getattr(self._torch.get_device_properties(self.current_device()), "has_fp64", True))

    def is_triton_supported(self) -> bool:
        """Whether Triton is installed and knows this kind of device, for CUDA from compute capability 7.0."""
        if not self.platform.has_triton or importlib.util.find_spec("triton") is None:
            return False
        if self.name != "cuda" or torch.version.hip is not None:
            return True
        return self.device_count() > 0 and self._torch.get_device_capability() >= (7, 0)

    # -- miscellaneous

    def amp(self) -> ModuleType:
        """The vendor's module with autocast, else torch's."""
        module: ModuleType = getattr(self._torch, "amp", torch.amp)
        return module

    def range_push(self, msg: str) -> None:
        """Open a named range, for vendors that have nvtx."""
        if nvtx := getattr(self._torch, "nvtx", None):
            nvtx.range_push(msg)

    def range_pop(self) -> None:
        """Close the last range."""
        if nvtx := getattr(self._torch, "nvtx", None):
            nvtx.range_pop()

    def lazy_call(self, callback: Callable[[], None]) -> None:
        """Call it once the device is initialised."""
        self._call("_lazy_call", callback, absent=callback)

    def communication_backend_version(self) -> tuple[int, ...] | None:
        """NCCL's or RCCL's version."""
        nccl = getattr(self._torch, "nccl", None)
        return tuple(nccl.version()) if nccl else None

    def direct_file(self, path: str, flags: int) -> Any:
        """torch.cuda.gds.GdsFile, or what a vendor has under this name. Raises OSError or RuntimeError where it cannot open."""
        make = getattr(getattr(self._torch, "gds", None), "GdsFile", None)
        return None if make is None else make(path, flags)

    # -- graphs

    def create_graph(self) -> Any:
        """An empty graph, or None where the device has none."""
        graph_class = getattr(self._torch, f"{self.platform.device_type.upper()}Graph", None)
        return graph_class() if graph_class else None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> AbstractContextManager[Any]:
        """A context whose work is recorded into `graph`."""
        capture: Callable[..., AbstractContextManager[Any]] | None = getattr(self._torch, "graph", None)
        return super().capture_to_graph(graph, pool, stream) if capture is None else capture(graph, pool, stream)

    def replay_graph(self, graph: Any) -> None:
        """Do the recorded work again."""
        if graph is None:
            super().replay_graph(graph)
        graph.replay()

    # -- host memory

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        """A page-locked copy, or the tensor itself if it is one."""
        return tensor.pin_memory()

    def register_host_memory(self, tensor: Tensor) -> bool:
        """Page-lock a CPU tensor where it is; CUDA and ROCm only."""
        if not (self.platform.has_host_registration and self.is_available()):
            return False
        return int(self._torch.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) == 0

    def unpin_memory(self, tensor: Tensor) -> bool:
        """Undo register_host_memory."""
        if not (self.platform.has_host_registration and self.is_available()):
            return False
        return int(self._torch.cudart().cudaHostUnregister(tensor.data_ptr())) == 0


ACCELERATOR = DeviceAccelerator

"""The surface of an accelerator, and what every device answers alike.

`get_accelerator()` returns one final class of this. The base answers as a machine with one device and one queue would:
streams and events exist but order nothing, ranges are not recorded, memory need not be pinned. `device.py` replaces
those groups for devices that have them, `cpu.py` and `mps.py` give the memory numbers.

Invariant: the constructor touches no device. Method names and groups are those of the public contract.
"""

from __future__ import annotations

import abc
import functools
import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deepspeed.accelerator.platforms import Platform
from deepspeed.utils.errors import NotAvailableError

OP_BUILDERS = "deepspeed.ops.op_builder"


class HostEvent:
    """An event on a queue that is always empty: it has happened when it is recorded."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._recorded_s = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._recorded_s = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`."""
        return (end._recorded_s - self._recorded_s) * 1e3


class DeepSpeedAccelerator(abc.ABC):
    """A kind of device. One object per process; indices are those of the visible devices of this process."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.name = platform.name
        self._compile_backend = platform.compile_backend

    # -- device

    @abc.abstractmethod
    def is_available(self) -> bool:
        """Whether there is at least one such device."""

    @abc.abstractmethod
    def device_count(self) -> int:
        """How many devices this process could use."""

    @abc.abstractmethod
    def set_device(self, device_index: int) -> None:
        """Make it the current device."""

    @abc.abstractmethod
    def current_device(self) -> int | str:
        """The current device, as torch accepts one: an index, or "cpu"."""

    @abc.abstractmethod
    def synchronize(self, device_index: int | None = None) -> None:
        """Wait until the device has done everything asked of it."""

    def is_synchronized_device(self) -> bool:
        """Whether work is done when the call that asked for it returns."""
        return True

    def use_host_timers(self) -> bool:
        """Whether the host's clock times the device's work."""
        return self.is_synchronized_device()

    def resolves_data_dependency(self) -> bool:
        """Whether results can be used across streams without ordering them."""
        return self.is_synchronized_device() or self.platform.orders_by_itself

    def handles_memory_backpressure(self) -> bool:
        """Whether the host cannot run ahead of the device's memory."""
        return self.is_synchronized_device() or self.platform.orders_by_itself

    def device_name(self, device_index: int | None = None) -> str:
        """torch's name of the device type, or of one device: "cuda", "cuda:1"."""
        kind = self.platform.device_type
        return kind if device_index is None else f"{kind}:{device_index}"

    def current_device_name(self) -> str:
        """torch's name of the current device."""
        return self.device_name(int(self.current_device()))

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        """A context in which that device is the current one."""
        return nullcontext()

    # -- random numbers

    @abc.abstractmethod
    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        """Set the state of a device's generator."""

    @abc.abstractmethod
    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        """The state of a device's generator."""

    @abc.abstractmethod
    def manual_seed(self, seed: int) -> None:
        """Seed the current device's generator."""

    @abc.abstractmethod
    def default_generator(self, device_index: int) -> torch.Generator:
        """A device's generator."""

    def manual_seed_all(self, seed: int) -> None:
        """Seed every device's generator."""
        self.manual_seed(seed)

    def initial_seed(self) -> int:
        """The seed the current generator started from."""
        return torch.initial_seed()

    def random(self) -> ModuleType:
        """The module torch.random."""
        return torch.random

    # -- streams and events

    def has_streams(self) -> bool:
        """Whether there is more than one queue of work; if not, streams and events order nothing."""
        return False

    @property
    def Stream(self) -> Any:  # noqa: N802 - the contract's name
        """The stream class."""
        return torch.cpu.Stream

    @property
    def Event(self) -> Any:  # noqa: N802 - the contract's name
        """The event class."""
        return HostEvent

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which work is queued on `stream`."""
        return nullcontext(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        """The stream that work is queued on now."""
        return torch.cpu.current_stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        """The stream that work is queued on unless told otherwise."""
        return torch.cpu.current_stream()

    def is_current_stream_capturing(self) -> bool:
        """Whether a graph is being captured."""
        return False

    # -- memory, in bytes

    @abc.abstractmethod
    def memory_allocated(self, device_index: int | None = None) -> int:
        """Held by tensors."""

    @abc.abstractmethod
    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """The most held by tensors since the last reset."""

    @abc.abstractmethod
    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Start the maxima anew."""

    @abc.abstractmethod
    def total_memory(self, device_index: int | None = None) -> int:
        """What the device has."""

    @abc.abstractmethod
    def available_memory(self, device_index: int | None = None) -> int:
        """What can still be allocated."""

    def memory_reserved(self, device_index: int | None = None) -> int:
        """Held by the allocator."""
        return self.memory_allocated(device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        """The most held by the allocator since the last reset."""
        return self.max_memory_allocated(device_index)

    def memory_cached(self, device_index: int | None = None) -> int:
        """Older name of memory_reserved."""
        return self.memory_reserved(device_index)

    def max_memory_cached(self, device_index: int | None = None) -> int:
        """Older name of max_memory_reserved."""
        return self.max_memory_reserved(device_index)

    def reset_max_memory_allocated(self, device_index: int | None = None) -> None:
        """Older name of reset_peak_memory_stats."""
        self.reset_peak_memory_stats(device_index)

    def reset_max_memory_cached(self, device_index: int | None = None) -> None:
        """Older name of reset_peak_memory_stats."""
        self.reset_peak_memory_stats(device_index)

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """The allocator's counters, by torch.cuda's names."""
        return {
            "allocated_bytes.all.current": self.memory_allocated(device_index),
            "allocated_bytes.all.peak": self.max_memory_allocated(device_index),
        }

    def empty_cache(self) -> None:  # noqa: B027 - a documented no-op
        """Give memory that no tensor holds back to the system."""

    # -- dtypes

    def is_bf16_supported(self) -> bool:
        """Whether torch computes in bfloat16 here."""
        return True

    def is_fp16_supported(self) -> bool:
        """Whether torch computes in float16 here."""
        return True

    def is_fp64_supported(self) -> bool:
        """Whether torch computes in float64 here."""
        return self.platform.has_float64

    def is_triton_supported(self) -> bool:
        """Whether Triton compiles kernels for this device."""
        return False

    def supported_dtypes(self) -> list[torch.dtype]:
        """What a model may be trained in."""
        support = [
            (torch.float32, True),
            (torch.float16, self.is_fp16_supported()),
            (torch.bfloat16, self.is_bf16_supported()),
        ]
        return [dtype for dtype, is_supported in support if is_supported]

    # -- miscellaneous

    def amp(self) -> ModuleType:
        """The module with autocast for this device."""
        return torch.amp

    def range_push(self, msg: str) -> None:  # noqa: B027 - a documented no-op
        """Open a named range in the vendor's profiler."""

    def range_pop(self) -> None:  # noqa: B027 - a documented no-op
        """Close the last range."""

    def lazy_call(self, callback: Callable[[], None]) -> None:
        """Call it once the device is initialised."""
        callback()

    def communication_backend_name(self) -> str:
        """torch.distributed's backend for this device."""
        return self.platform.backend

    def communication_backend_version(self) -> tuple[int, ...] | None:
        """The version of the communication library, where it tells one."""
        return None

    def on_accelerator(self, tensor: Tensor) -> bool:
        """Whether the tensor is in this device's memory."""
        return tensor.device.type == self.platform.device_type

    def direct_file(self, path: str, flags: int) -> Any:
        """An open file that the vendor's library moves straight to and from the device's memory, with `load_storage` and
        `save_storage` of torch.cuda.gds; None where there is no such library."""
        return None

    # -- graphs

    def create_graph(self) -> Any:
        """An empty graph, or None where the device has none."""
        return None

    def capture_to_graph(self, graph: Any, pool: Any = None, stream: Any = None) -> AbstractContextManager[Any]:
        """A context whose work is recorded into `graph`."""
        raise NotAvailableError(f"{self.name} devices have no graphs. Run the work directly.")

    def replay_graph(self, graph: Any) -> None:
        """Do the recorded work again."""
        raise NotAvailableError(f"{self.name} devices have no graphs. Run the work directly.")

    # -- tensors

    def _tensor_maker(self, dtype: torch.dtype) -> Callable[..., Tensor]:
        return functools.partial(torch.tensor, dtype=dtype, device=self.device_name())

    @property
    def BFloat16Tensor(self) -> Callable[..., Tensor]:  # noqa: N802 - the contract's name
        """Makes a bfloat16 tensor on this device."""
        return self._tensor_maker(torch.bfloat16)

    @property
    def ByteTensor(self) -> Callable[..., Tensor]:  # noqa: N802 - the contract's name
        """Makes a uint8 tensor on this device."""
        return self._tensor_maker(torch.uint8)

    @property
    def DoubleTensor(self) -> Callable[..., Tensor]:  # noqa: N802 - the contract's name
        """Makes a float64 tensor on this device."""
        return self._tensor_maker(torch.float64)

    @property
    def FloatTensor(self) -> Callable[..., Tensor]:  # noqa: N802 - the contract's name
        """Makes a float32 tensor on this device."""
        return self._tensor_maker(torch.float32)

    @property
    def HalfTensor(self) -> Callable[..., Tensor]:  # noqa: N802 - the contract's name
        """Makes a float16 tensor on this device."""
        return self._tensor_maker(torch.float16)

    @property
    def IntTensor(self) -> Callable[..., Tensor]:  # noqa: N802 - the contract's name
        """Makes an int32 tensor on this device."""
        return self._tensor_maker(torch.int32)

    @property
    def LongTensor(self) -> Callable[..., Tensor]:  # noqa: N802 - the contract's name
        """Makes an int64 tensor on this device."""
        return self._tensor_maker(torch.int64)

    def pin_memory(self, tensor: Tensor, align_bytes: int = 1) -> Tensor:
        """The tensor in page-locked memory, from which the device copies asynchronously; itself where that is moot."""
        return tensor

    def pin_empty(self, *size: int, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """An uninitialised tensor, page-locked where that matters."""
        return self.pin_memory(torch.empty(*size, dtype=dtype, device=device))

    def pin_empty_like(self, tensor: Tensor) -> Tensor:
        """An uninitialised CPU tensor of the same shape and dtype, page-locked where that matters."""
        return self.pin_memory(torch.empty_like(tensor, device="cpu"))

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether the tensor is in page-locked memory."""
        return tensor.is_pinned()

    def register_host_memory(self, tensor: Tensor) -> bool:
        """Page-lock a CPU tensor where it is. False where the device cannot, or need not."""
        return False

    def unpin_memory(self, tensor: Tensor) -> bool:
        """Undo register_host_memory. False where there was nothing to undo."""
        return False

    # -- operators built ahead of time

    def op_builder_dir(self) -> str:
        """The package with the op builders."""
        return OP_BUILDERS

    def get_op_builder(self, class_name: str) -> Any:
        """The class of an op builder. Raises NotAvailableError where this version has none of that name."""
        try:
            return getattr(importlib.import_module(OP_BUILDERS), class_name)
        except (ImportError, AttributeError):
            raise NotAvailableError(
                f"op builder {class_name!r} is not available in this version.\n"
                "  The optimizers and kernels of deepspeed work without it; use those directly."
            ) from None

    def create_op_builder(self, class_name: str) -> Any:
        """An op builder. Raises NotAvailableError where this version has none of that name."""
        return self.get_op_builder(class_name)()

    def build_extension(self) -> Any:
        """torch's setuptools command that builds extensions."""
        return importlib.import_module("torch.utils.cpp_extension").BuildExtension

    # -- launching

    def export_envs(self) -> list[str]:
        """Prefixes of the variables that go along to remote nodes."""
        return list(self.platform.export_prefixes)

    def visible_devices_envs(self) -> list[str]:
        """The variables that limit which devices a process sees."""
        return [self.platform.visible_devices] if self.platform.visible_devices else []

    def set_visible_devices_envs(self, current_env: dict[str, str], local_accelerator_ids: Iterable[int]) -> None:
        """Write those variables into an environment."""
        for name in self.visible_devices_envs():
            current_env[name] = ",".join(map(str, local_accelerator_ids))

    # -- compilation

    def get_compile_backend(self) -> str:
        """The backend `engine.compile` uses unless told otherwise."""
        return self._compile_backend

    def set_compile_backend(self, backend: str) -> None:
        """Set it. Raises ValueError, listing torch's backends, for one that torch does not know."""
        known: Sequence[str] = importlib.import_module("torch._dynamo").list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(f"compile backend {backend!r} is not one of {', '.join(known)}.")
        self._compile_backend = backend

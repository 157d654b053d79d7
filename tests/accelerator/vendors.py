"""Stand-ins for vendors' torch modules, with what each of them has and lacks: `torch.xpu`, `torch.npu`, `torch.hpu`, ...

A fake answers every function with a value one can tell, keeps what it was called with, and lacks the names that the vendor's module
lacks. What XPU's and CUDA's modules have is held against torch's own in the tests; HPU's and NPU's is from their documentation.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch

GIB = 2**30

LACKS: dict[str, set[str]] = {
    "cuda": set(),
    "xpu": {"default_stream", "amp", "nvtx", "nccl", "cudart"},
    "npu": {"nvtx", "nccl", "cudart"},
    "mlu": {"nvtx", "nccl", "cudart"},
    "hpu": {
        *("default_stream", "nvtx", "nccl", "cudart", "amp", "empty_cache", "mem_get_info", "get_device_properties"),
        *("memory_reserved", "max_memory_reserved", "is_bf16_supported", "is_current_stream_capturing", "_lazy_call"),
        *("set_rng_state", "get_rng_state", "manual_seed", "manual_seed_all", "initial_seed", "default_generators"),
    },
}
"""By device type, the names of torch.cuda that the vendor's module lacks."""

IN_RANDOM = ("set_rng_state", "get_rng_state", "manual_seed", "manual_seed_all", "initial_seed", "default_generators")
"""What HPU's module has in `random`."""


class Stream:
    """A stream of the fake."""

    def __init__(self, device: Any = None) -> None:
        self.device = device


def fake(kind: str) -> Any:
    """The module `torch.<kind>`, with two devices, the second current. `calls` has every call."""
    module: Any = types.ModuleType(f"torch.{kind}")
    module.calls = []

    def answer(name: str, value: Any) -> Any:
        def function(*args: Any) -> Any:
            module.calls.append((name, *args))
            return value

        return function

    answers: dict[str, Any] = {
        **{"is_available": True, "device_count": 2, "current_device": 1, "set_device": None, "synchronize": None},
        **{"memory_allocated": 3 * GIB, "max_memory_allocated": 4 * GIB, "reset_peak_memory_stats": None},
        **{"memory_reserved": 5 * GIB, "max_memory_reserved": 6 * GIB, "empty_cache": None},
        "memory_stats": {"allocated_bytes.all.current": 3 * GIB, "Limit": 16 * GIB},
        "mem_get_info": (7 * GIB, 16 * GIB),
        "get_device_properties": types.SimpleNamespace(name=kind, total_memory=16 * GIB),
        **{"is_bf16_supported": True, "get_device_capability": (9, 0), "is_current_stream_capturing": True},
        **{"manual_seed": None, "manual_seed_all": None, "initial_seed": 7, "set_rng_state": None},
        "get_rng_state": torch.zeros(1, dtype=torch.uint8),
        **{"device": contextlib.nullcontext(), "stream": contextlib.nullcontext(), "graph": contextlib.nullcontext()},
        **{"current_stream": "current", "default_stream": "default"},
    }
    names: dict[str, Any] = {name: answer(name, value) for name, value in answers.items()}
    names |= {"Stream": Stream, "Event": type("Event", (), {}), "amp": types.ModuleType("amp")}
    names |= {"default_generators": [torch.Generator(), torch.Generator()]}
    names |= {"nvtx": types.SimpleNamespace(range_push=answer("push", None), range_pop=answer("pop", None))}
    names |= {"nccl": types.SimpleNamespace(version=lambda: (2, 27, 3)), "_lazy_call": lambda callback: callback()}
    names |= {f"{kind.upper()}Graph": type("Graph", (), {"replay": answer("replay", None)})}
    names |= {
        "cudart": lambda: types.SimpleNamespace(
            cudaHostRegister=answer("register", 0), cudaHostUnregister=answer("unregister", 0)
        )
    }
    if kind == "hpu":
        module.random = types.SimpleNamespace(**{name: names[name] for name in IN_RANDOM})
    for name in names.keys() - LACKS[kind]:
        setattr(module, name, names[name])
    return module


def install(monkeypatch: pytest.MonkeyPatch, kind: str, plugin: str | None = None) -> Any:
    """Make the fake torch's module of that name, and its plugin an installed package."""
    module = fake(kind)
    monkeypatch.setattr(torch, kind, module, raising=False)
    parts = plugin.split(".") if plugin else []
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        package = types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    return module

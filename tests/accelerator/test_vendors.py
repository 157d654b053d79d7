"""What `get_accelerator()` makes of each vendor's torch module: the same surface, whatever the vendor lacks."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

import deepspeed.accelerator as package
from deepspeed.accelerator import get_accelerator, platforms
from deepspeed.accelerator.platforms import PLATFORMS
from deepspeed.tiers import CopyStream
from deepspeed.utils.errors import NotAvailableError
from tests.accelerator.vendors import GIB, LACKS, fake, install


class Vendor(NamedTuple):
    """A platform's accelerator object over a fake of its module."""

    name: str
    accelerator: Any
    module: Any


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No accelerator chosen yet, no device here, and the previous one back afterwards."""
    monkeypatch.setattr(package, "_current", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for kind in ("xpu", "cuda"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return monkeypatch


@pytest.fixture(params=["xpu", "npu", "hpu", "mlu", "klxpu", "cuda"])
def vendor(fresh: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Vendor:
    """Found, not named: the vendor's module says that there are devices."""
    row = PLATFORMS[request.param]
    module = install(fresh, row.device_type, row.plugin)
    return Vendor(row.name, get_accelerator(), module)


def test_a_device_that_is_there_is_found_and_named_as_torch_names_it(vendor: Vendor) -> None:
    kind = "cuda" if vendor.name == "klxpu" else vendor.name
    accelerator = vendor.accelerator
    assert accelerator.name == vendor.name
    assert (accelerator.device_name(), accelerator.device_name(0)) == (kind, f"{kind}:0")
    assert (accelerator.current_device_name(), accelerator.device_count()) == (f"{kind}:1", 2)


@pytest.mark.parametrize(
    ("name", "backend", "visible", "compile_backend"),
    [
        ("cuda", "nccl", ["CUDA_VISIBLE_DEVICES"], "inductor"),
        ("xpu", "xccl", ["ZE_AFFINITY_MASK"], "inductor"),
        ("npu", "hccl", ["ASCEND_RT_VISIBLE_DEVICES"], "inductor"),
        ("hpu", "hccl", [], "hpu_backend"),
        ("mps", "gloo", ["CUDA_VISIBLE_DEVICES"], "inductor"),
        ("cpu", "gloo", ["CUDA_VISIBLE_DEVICES"], "inductor"),
    ],
)
def test_backends_and_variables_are_the_platforms(
    fresh: pytest.MonkeyPatch, name: str, backend: str, visible: list[str], compile_backend: str
) -> None:
    if name not in ("mps", "cpu"):
        install(fresh, name, PLATFORMS[name].plugin)
    fresh.setenv("DS_ACCELERATOR", name)
    accelerator = get_accelerator()
    assert accelerator.communication_backend_name() == backend
    assert accelerator.visible_devices_envs() == visible
    assert accelerator.get_compile_backend() == compile_backend


def test_nothing_of_the_device_is_touched_until_it_is_asked_for(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("DS_ACCELERATOR", "npu")
    module = install(fresh, "npu", "torch_npu")
    accelerator = get_accelerator()
    assert (accelerator.communication_backend_name(), accelerator.device_name(3)) == ("hccl", "npu:3")
    assert accelerator.supported_dtypes.__self__ is accelerator
    assert module.calls == []


def test_memory_numbers_exist_whatever_the_vendor_counts(vendor: Vendor) -> None:
    accelerator = vendor.accelerator
    counts_reserved = "memory_reserved" not in LACKS[vendor.module.__name__.partition(".")[2]]
    assert (accelerator.memory_allocated(), accelerator.max_memory_allocated()) == (3 * GIB, 4 * GIB)
    assert accelerator.memory_reserved() == accelerator.memory_cached() == (5 if counts_reserved else 3) * GIB
    assert accelerator.max_memory_reserved() == accelerator.max_memory_cached() == (6 if counts_reserved else 4) * GIB
    assert accelerator.total_memory() == 16 * GIB
    # Free on the device and what the allocator holds without a tensor; or, where nobody tells, what tensors do not hold.
    assert accelerator.available_memory() == (7 + 5 - 3 if counts_reserved else 16 - 3) * GIB
    assert accelerator.memory_stats()["allocated_bytes.all.current"] == 3 * GIB
    accelerator.reset_peak_memory_stats()
    accelerator.reset_max_memory_allocated()
    accelerator.empty_cache()


def test_random_states_go_to_the_device_that_is_meant(vendor: Vendor) -> None:
    accelerator, state = vendor.accelerator, torch.ones(1, dtype=torch.uint8)
    accelerator.manual_seed(3)
    accelerator.manual_seed_all(4)
    accelerator.set_rng_state(state)
    accelerator.set_rng_state(state, 0)
    accelerator.get_rng_state(0)
    assert accelerator.initial_seed() == 7
    assert isinstance(accelerator.default_generator(1), torch.Generator)
    calls = [call for call in vendor.module.calls if call[0] not in ("current_device", "is_available", "device_count")]
    assert [call[0] for call in calls] == [
        *("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state", "get_rng_state", "initial_seed")
    ]
    assert [call[-1] for call in calls[2:5]] == [1, 0, 0]


def test_a_vendor_without_random_functions_has_its_generators(fresh: pytest.MonkeyPatch) -> None:
    module = install(fresh, "mlu", "torch_mlu")
    for name in ("set_rng_state", "get_rng_state", "manual_seed", "manual_seed_all", "initial_seed"):
        delattr(module, name)
    accelerator = get_accelerator()
    accelerator.manual_seed_all(5)
    assert accelerator.initial_seed() == module.default_generators[1].initial_seed() == 5
    state = accelerator.get_rng_state(1)
    first = torch.rand(1, generator=module.default_generators[1])
    accelerator.set_rng_state(state)
    assert torch.equal(first, torch.rand(1, generator=module.default_generators[1]))


def test_streams_are_the_vendors_and_a_default_one_always_exists(vendor: Vendor) -> None:
    accelerator = vendor.accelerator
    assert accelerator.has_streams()
    assert accelerator.Stream is vendor.module.Stream
    assert accelerator.Event is vendor.module.Event
    assert accelerator.current_stream() == "current"
    assert accelerator.default_stream() == ("default" if hasattr(vendor.module, "default_stream") else "current")
    assert accelerator.is_current_stream_capturing() is hasattr(vendor.module, "is_current_stream_capturing")
    with accelerator.device(0), accelerator.stream(accelerator.Stream()):
        pass


def test_only_a_device_that_orders_its_streams_says_so(vendor: Vendor) -> None:
    accelerator = vendor.accelerator
    assert not accelerator.is_synchronized_device()
    assert not accelerator.use_host_timers()
    assert accelerator.resolves_data_dependency() == accelerator.handles_memory_backpressure() == (vendor.name == "hpu")


def test_dtypes_are_the_vendors(vendor: Vendor) -> None:
    accelerator = vendor.accelerator
    assert accelerator.supported_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    assert accelerator.is_fp64_supported() is (vendor.name not in ("npu", "hpu"))
    vendor.module.is_bf16_supported = lambda: False
    assert accelerator.supported_dtypes() == [torch.float32, torch.float16]


@pytest.mark.parametrize("has_fp64", [True, False])
def test_intels_cards_say_themselves_whether_they_have_float64(fresh: pytest.MonkeyPatch, has_fp64: bool) -> None:
    module = install(fresh, "xpu")
    module.get_device_properties = lambda _: types.SimpleNamespace(has_fp64=has_fp64)
    assert get_accelerator().is_fp64_supported() is has_fp64


@pytest.mark.parametrize(
    ("capability", "hip", "has"), [((7, 0), None, True), ((6, 1), None, False), ((6, 1), "6.4", True)]
)
def test_triton_needs_a_recent_card_of_nvidia_or_any_of_amd(
    fresh: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, has: bool
) -> None:
    module = install(fresh, "cuda")
    module.get_device_capability = lambda: capability
    fresh.setattr(torch.version, "hip", hip)
    triton = types.ModuleType("triton")
    triton.__spec__ = package.importlib.machinery.ModuleSpec("triton", None)
    fresh.setitem(sys.modules, "triton", triton)
    assert get_accelerator().is_triton_supported() is has


def test_rocm_is_cuda_to_torch_and_here(fresh: pytest.MonkeyPatch) -> None:
    install(fresh, "cuda")
    fresh.setattr(torch.version, "hip", "6.4")
    accelerator = get_accelerator()
    assert (accelerator.name, accelerator.device_name(), accelerator.communication_backend_name()) == (
        *("cuda", "cuda", "nccl"),
    )


def test_ranges_graphs_and_versions_exist_where_the_vendor_has_them(vendor: Vendor) -> None:
    accelerator, module = vendor.accelerator, vendor.module
    accelerator.range_push("a")
    accelerator.range_pop()
    assert (("push", "a") in module.calls) is hasattr(module, "nvtx")
    assert accelerator.communication_backend_version() == ((2, 27, 3) if hasattr(module, "nccl") else None)
    assert accelerator.amp() is getattr(module, "amp", torch.amp)
    graph = accelerator.create_graph()
    with accelerator.capture_to_graph(graph):
        pass
    accelerator.replay_graph(graph)
    asked: list[int] = []
    accelerator.lazy_call(lambda: asked.append(1))
    assert asked == [1]


def test_a_vendor_without_graphs_refuses_them_by_name(fresh: pytest.MonkeyPatch) -> None:
    module = install(fresh, "npu", "torch_npu")
    del module.NPUGraph, module.graph
    accelerator = get_accelerator()
    assert accelerator.create_graph() is None
    with pytest.raises(NotAvailableError, match="npu devices have no graphs"):
        accelerator.capture_to_graph(None)
    with pytest.raises(NotAvailableError, match="npu devices have no graphs"):
        accelerator.replay_graph(None)


def test_memory_is_page_locked_in_place_by_cudas_runtime_alone(vendor: Vendor) -> None:
    tensor = torch.zeros(4)
    assert vendor.accelerator.register_host_memory(tensor) is (vendor.name == "cuda")
    assert vendor.accelerator.unpin_memory(tensor) is (vendor.name == "cuda")


def test_pinned_copies_are_torchs(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = torch.ones(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned)
    assert vendor.accelerator.pin_memory(torch.zeros(3)) is pinned
    assert vendor.accelerator.pin_empty(3) is pinned
    assert vendor.accelerator.pin_empty_like(torch.zeros(3)) is pinned


def test_a_device_without_streams_copies_before_the_call_returns(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("DS_ACCELERATOR", "mps")
    assert not get_accelerator().has_streams()
    target, source = torch.zeros(3), torch.ones(3)
    event = CopyStream(torch.device("mps")).copy(target, source)
    event.wait(get_accelerator().current_stream())
    event.synchronize()
    assert event.query()
    assert torch.equal(target, source)


def test_the_first_platform_of_the_table_that_has_a_device_wins(fresh: pytest.MonkeyPatch) -> None:
    install(fresh, "cuda")
    install(fresh, "hpu", PLATFORMS["hpu"].plugin)
    assert get_accelerator().name == "hpu"


def test_a_plugin_without_a_device_is_passed_over(fresh: pytest.MonkeyPatch) -> None:
    install(fresh, "npu", "torch_npu").device_count = lambda: 0
    assert get_accelerator().name == "cpu"


@pytest.mark.parametrize("kind", ["xpu", "cuda"])
def test_the_fakes_lack_what_torchs_own_module_lacks_and_have_nothing_more(kind: str) -> None:
    real = getattr(torch, kind)
    ours = {name for name in vars(fake(kind)) if not name.startswith("__") and name not in ("calls", "random")}
    is_built = torch.cuda.is_available() or kind != "cuda"
    assert {name for name in ours if is_built and not hasattr(real, name)} <= {
        "XPUGraph",
        "graph",
        "is_current_stream_capturing",  # with graphs, of later versions
    }


def test_every_row_says_what_the_launcher_and_torch_need() -> None:
    for row in PLATFORMS.values():
        assert row.device_type.isidentifier()
        assert row.backend in ("nccl", "xccl", "hccl", "tccl", "gloo", "cncl", "sccl")
    assert platforms.custom("x").backend == ""

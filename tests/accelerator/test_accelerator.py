"""Choice of the accelerator, the promised surface, and what the CPU answers."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import deepspeed.accelerator as package
from deepspeed.accelerator import get_accelerator, platforms, set_accelerator
from deepspeed.accelerator.base import DeepSpeedAccelerator
from deepspeed.accelerator.cpu import CpuAccelerator
from deepspeed.accelerator.device import DeviceAccelerator
from deepspeed.accelerator.mps import MpsAccelerator
from deepspeed.accelerator.platforms import PLATFORMS
from deepspeed.utils.errors import NotAvailableError

_PROMISED = """
    is_synchronized_device use_host_timers resolves_data_dependency handles_memory_backpressure device_name device
    set_device current_device current_device_name device_count synchronize
    random set_rng_state get_rng_state manual_seed manual_seed_all initial_seed default_generator
    Stream stream current_stream default_stream Event
    empty_cache memory_allocated max_memory_allocated reset_max_memory_allocated memory_cached max_memory_cached
    reset_max_memory_cached memory_stats reset_peak_memory_stats memory_reserved max_memory_reserved total_memory
    available_memory
    is_bf16_supported is_fp16_supported is_fp64_supported supported_dtypes is_triton_supported
    amp is_available range_push range_pop lazy_call communication_backend_name communication_backend_version
    is_current_stream_capturing on_accelerator
    create_graph capture_to_graph replay_graph
    BFloat16Tensor ByteTensor DoubleTensor FloatTensor HalfTensor IntTensor LongTensor
    pin_memory pin_empty pin_empty_like is_pinned unpin_memory register_host_memory
    op_builder_dir create_op_builder get_op_builder build_extension
    export_envs visible_devices_envs set_visible_devices_envs
    get_compile_backend set_compile_backend
"""
PROMISED = _PROMISED.split()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """No accelerator chosen yet, and the previous one back afterwards."""
    monkeypatch.setattr(package, "_current", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return monkeypatch


@pytest.fixture
def cpu() -> CpuAccelerator:
    return CpuAccelerator(PLATFORMS["cpu"])


@pytest.mark.parametrize("kind", [CpuAccelerator, DeviceAccelerator, MpsAccelerator])
def test_every_promised_name_exists_on_every_accelerator(kind: type[DeepSpeedAccelerator]) -> None:
    assert [name for name in PROMISED if name not in dir(kind)] == []


def test_names_and_order_of_choice_are_those_of_the_contract() -> None:
    assert " ".join(PLATFORMS) == "xpu npu sdaa mps hpu mlu supa klxpu cuda cpu"


def test_the_accelerator_is_one_object(fresh: pytest.MonkeyPatch) -> None:
    assert get_accelerator() is get_accelerator()


def test_the_environment_overrides_the_choice(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("DS_ACCELERATOR", "cpu")
    assert get_accelerator().device_name() == "cpu"


def test_the_override_may_name_a_device_that_is_absent(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("DS_ACCELERATOR", "cuda")
    accelerator = get_accelerator()
    assert accelerator.communication_backend_name() == "nccl"
    assert accelerator.device_name(1) == "cuda:1"


def test_an_unknown_override_lists_the_names(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("DS_ACCELERATOR", "tpu")
    with pytest.raises(ValueError, match=r"DS_ACCELERATOR=tpu is not a known.*\n.*xpu, npu, .*cuda, cpu"):
        get_accelerator()


def test_a_missing_vendor_package_is_named(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("DS_ACCELERATOR", "mlu")
    with pytest.raises(ValueError, match=r"DS_ACCELERATOR=mlu needs the package torch_mlu"):
        get_accelerator()


def test_set_accelerator_replaces_it(fresh: pytest.MonkeyPatch, cpu: CpuAccelerator) -> None:
    set_accelerator(cpu)
    assert get_accelerator() is cpu


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, deepspeed.accelerator, deepspeed.accelerator.platforms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_cpu_counts_ranks_by_local_size_then_numa_nodes(tmp_path: Path) -> None:
    for node, cores in (("node0", "0-3\n"), ("node1", "\n"), ("node2", "4-7\n")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cores)
    assert platforms.cpu_device_count({}, tmp_path) == 2
    assert platforms.cpu_device_count({"LOCAL_SIZE": "3"}, tmp_path) == 3
    assert platforms.cpu_device_count({"LOCAL_SIZE": "0"}, tmp_path) == 2
    assert platforms.cpu_device_count({}, tmp_path / "absent") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="device nodes are looked at on Linux only")
@pytest.mark.parametrize(
    ("node", "environ", "known"),
    [
        (None, {}, "cpu"),
        ("nvidia0", {}, "cuda"),
        ("nvidiactl", {}, "cpu"),
        ("kfd", {}, "cuda"),
        ("davinci0", {}, None),
        ("renderD128", {}, "cpu"),
        ("nvidia0", {"DS_ACCELERATOR": "cpu"}, "cpu"),
        (None, {"DS_ACCELERATOR": "xpu"}, "xpu"),
    ],
)
def test_device_nodes_tell_the_platform_without_torch(
    tmp_path: Path, node: str | None, environ: dict[str, str], known: str | None
) -> None:
    if node:
        (tmp_path / node).touch()
    found = platforms.known_without_torch(environ, tmp_path)
    assert (found.name if found else None) == known


def test_the_cpu_is_one_synchronous_device(cpu: CpuAccelerator) -> None:
    assert (cpu.device_name(3), cpu.current_device(), cpu.current_device_name()) == ("cpu", "cpu", "cpu")
    assert cpu.communication_backend_name() == "gloo"
    assert cpu.is_synchronized_device()
    assert cpu.use_host_timers()
    cpu.synchronize()
    with cpu.device(0), cpu.stream(cpu.Stream()):
        assert cpu.on_accelerator(torch.zeros(1))


def test_events_on_the_cpu_measure_time(cpu: CpuAccelerator) -> None:
    start, end = cpu.Event(enable_timing=True), cpu.Event(enable_timing=True)
    start.record()
    end.record()
    assert start.query()
    assert start.elapsed_time(end) >= 0


def test_the_cpu_trains_in_fp32_fp16_and_bf16(cpu: CpuAccelerator) -> None:
    assert cpu.supported_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    for dtype in cpu.supported_dtypes():
        assert (torch.ones(2, 2, dtype=dtype) @ torch.ones(2, 2, dtype=dtype))[0, 0] == 2


def test_cpu_memory_numbers_are_those_of_the_process(cpu: CpuAccelerator) -> None:
    cpu.reset_peak_memory_stats()
    before = cpu.memory_allocated()
    pages = mmap.mmap(
        -1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # the heap may hold as much that is free
    block = torch.frombuffer(pages, dtype=torch.float32).fill_(1.0)
    assert cpu.memory_allocated() - before > 0.9 * block.nbytes
    assert cpu.max_memory_allocated() >= before + 0.9 * block.nbytes
    assert cpu.memory_stats()["allocated_bytes.all.current"] > 0
    assert 0 < cpu.available_memory() <= cpu.total_memory()


def test_tensor_makers_have_their_dtype(cpu: CpuAccelerator) -> None:
    assert cpu.LongTensor([1, 2]).dtype == torch.int64
    assert cpu.BFloat16Tensor([1.0]).dtype == torch.bfloat16
    assert cpu.pin_empty(2, 3, dtype=torch.float16).shape == (2, 3)
    assert not cpu.is_pinned(cpu.pin_empty_like(torch.ones(3)))


def test_the_random_state_round_trips(cpu: CpuAccelerator) -> None:
    cpu.manual_seed_all(7)
    state = cpu.get_rng_state()
    first = torch.rand(1)
    cpu.set_rng_state(state)
    assert torch.equal(first, torch.rand(1))
    assert cpu.initial_seed() == 7


def test_visible_devices_are_a_comma_list(cpu: CpuAccelerator) -> None:
    env: dict[str, str] = {}
    cpu.set_visible_devices_envs(env, [0, 2])
    assert env == {"CUDA_VISIBLE_DEVICES": "0,2"}


def test_an_op_builder_that_is_not_there_is_named(cpu: CpuAccelerator) -> None:
    with pytest.raises(NotAvailableError, match=r"op builder 'NoSuchBuilder' is not available"):
        cpu.create_op_builder("NoSuchBuilder")


def test_graphs_on_the_cpu_are_refused(cpu: CpuAccelerator) -> None:
    assert cpu.create_graph() is None
    with pytest.raises(NotAvailableError, match="cpu devices have no graphs"):
        cpu.replay_graph(None)


def test_an_unknown_compile_backend_is_refused_with_torchs_list(cpu: CpuAccelerator) -> None:
    with pytest.raises(ValueError, match=r"'fast' is not one of .*inductor"):
        cpu.set_compile_backend("fast")
    cpu.set_compile_backend("eager")
    assert cpu.get_compile_backend() == "eager"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_answers_what_torch_cuda_answers() -> None:
    cuda = DeviceAccelerator(PLATFORMS["cuda"])
    assert cuda.device_count() == torch.cuda.device_count()
    assert cuda.current_device_name() == "cuda:0"
    assert cuda.total_memory() > cuda.available_memory() > 0
    with cuda.stream(cuda.Stream()):
        assert cuda.on_accelerator(cuda.FloatTensor([1.0]))
    assert cuda.pin_empty(3).is_pinned()

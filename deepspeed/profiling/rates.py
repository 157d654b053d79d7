"""What this machine can do, measured by all ranks at once: matrix products, copies, the wire, a disk.

Called by the autotuner's first run in its ranks, and by `deepspeed doctor`. Rates are the denominators of predictions
(`deepspeed.planner`): a step is so many operations, bytes copied, bytes sent. Ranks that share a processor slow each other
down, so each rate is taken while all ranks do the same thing; and where there are more of them than processors, over so many calls that
each has had its turn: a single one may run alone.

Invariant: `measure_rates` is collective where torch.distributed is up, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.peak import measured_peak
from deepspeed.comm.choose import make_exchange
from deepspeed.utils.launch_env import discover

NUM_RUNS, MOST_RUNS = 3, 40
NUM_SMALL = 64
"""Modules of the chain that tells what a module costs besides its arithmetic."""
COPY_NBYTES = 32 << 20
"""More than caches hold."""
SMALL_NUMEL, LARGE_NUMEL = 1 << 10, 1 << 21
"""Elements (fp32, all ranks together) of the two messages that tell latency and bandwidth apart."""
DISK_NBYTES = 64 << 20
WINDOW_S, NUM_WINDOWS = 0.03, 2
"""Of calls in a row where ranks take turns on processors, by a single one's clock. A turn is a few milliseconds."""
SIDE = 256
"""Of a product that takes less than a turn."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one rank while all of them work. Operations, bytes, seconds."""

    matmul_flops: float
    """Operations per second of large products in the run's dtype."""
    copy_nbytes_s: float
    """Bytes read and written per second by a copy on the device."""
    wire_nbytes_s: float = 0.0
    """Bytes per second that a rank receives in an all-gather; 0: alone."""
    wire_latency_s: float = 0.0
    """Of a collective with nothing in it."""
    sum_nbytes_s: float = 0.0
    """Bytes per second that a rank sends in an all-reduce of torch.distributed, counted as a ring's; 0: as `wire_nbytes_s`."""
    sum_latency_s: float = 0.0
    """Of an all-reduce with nothing in it; 0: as `wire_latency_s`."""
    message_s: float = 0.0
    """Of one more reduce-scatter or all-gather of a step under ZeRO, whatever its bytes (`engine.message_costs`); 0: as `wire_latency_s`."""
    sum_message_s: float = 0.0
    """Of one more all-reduce of a step's gradients; 0: as `message_s`."""
    unshard_s: float = 0.0
    """Of one more all-gather of parameters around their use, whatever its bytes, prefetched; 0: as `message_s`."""
    unshard_late_s: float = 0.0
    """Of one that begins when its module does; 0: as `unshard_s`."""
    unshard_param_s: float = 0.0
    """Of each parameter that becomes whole in one, whatever its bytes."""
    shared_message_s: float = 0.0
    """Of one more message of layers that ranks share, which all ranks stand still for; 0: as `sum_latency_s`."""
    shared_nbytes_s: float = 0.0
    """Bytes per second of such a message, counted as a ring's; 0: as `sum_nbytes_s`."""
    shared_wait: float = 0.0
    """Share of what ranks compute between such messages that one of them waits for the other."""
    update_s: float = 0.0
    """Of an optimizer's step besides the bytes that it touches, and"""
    update_param_s: float = 0.0
    """of each parameter of it (`engine.message_costs`); 0: not measured."""
    launch_s: float = 0.0
    """Of a small module's forward and backward, which is all overhead; 0: not measured."""
    host_nbytes_s: float = 0.0
    """Bytes per second between device and host; 0: they are one."""
    disk_read_nbytes_s: float = 0.0
    disk_write_nbytes_s: float = 0.0

    def as_json(self) -> dict[str, float]:
        """For a file."""
        return dataclasses.asdict(self)


def measure_rates(dtype: torch.dtype, folder: Path | None = None) -> Rates:
    """Measure, in about a second. `folder`: on the disk to measure, None for none. Collective."""
    device = torch.device(get_accelerator().current_device_name())
    _meet()
    matmul = measured_peak(dtype) / _turns(device)
    source = torch.ones(COPY_NBYTES // 4, device=device)
    target = torch.empty_like(source)
    copy_s = _fastest(lambda: target.copy_(source))
    host = 0.0
    if device.type != "cpu":
        away = torch.empty(COPY_NBYTES // 4, pin_memory=True)
        host = COPY_NBYTES / _fastest(lambda: away.copy_(source))
    latency_s, wire = _measure_wire(device)
    sum_latency_s, sums = _measure_sums(device)
    read, write = _measure_disk(folder) if folder is not None else (0.0, 0.0)
    return Rates(
        matmul_flops=matmul,
        copy_nbytes_s=2 * COPY_NBYTES / copy_s,
        wire_nbytes_s=wire,
        wire_latency_s=latency_s,
        sum_nbytes_s=sums,
        sum_latency_s=sum_latency_s,
        launch_s=_measure_launch(device),
        host_nbytes_s=host,
        disk_read_nbytes_s=read,
        disk_write_nbytes_s=write,
    )


def _measure_wire(device: torch.device) -> tuple[float, float]:
    """(seconds of an all-gather of nothing, bytes per second received in a large one)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0, 0.0
    exchange, size = make_exchange(None, device), dist.get_world_size()
    times = []
    for numel in (SMALL_NUMEL, LARGE_NUMEL):
        full = torch.zeros(-(-numel // size) * size, device=device)
        times.append(_fastest(lambda full=full: exchange.start_all_gather(full).wait()))  # type: ignore[misc]
    received = (LARGE_NUMEL - SMALL_NUMEL) * 4 * (size - 1) / size
    return times[0], received / max(times[1] - times[0], 1e-9)


def _measure_launch(device: torch.device) -> float:
    """Seconds of one small module, forward and backward, of a chain of them."""
    chain = torch.nn.Sequential(*(torch.nn.Linear(8, 8, device=device) for _ in range(NUM_SMALL)))
    x = torch.zeros(1, 8, device=device)
    with torch.enable_grad():
        return _fastest(lambda: chain(x).sum().backward()) / NUM_SMALL


def _measure_sums(device: torch.device) -> tuple[float, float]:
    """(seconds of an all-reduce of nothing, bytes per second sent in a large one), over all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 0.0, 0.0
    small, large = (torch.zeros(numel, device=device) for numel in (SMALL_NUMEL, LARGE_NUMEL))
    times = [_fastest(lambda tensor=tensor: dist.all_reduce(tensor)) for tensor in (small, large)]  # type: ignore[misc]
    size = dist.get_world_size()
    sent = 2 * (LARGE_NUMEL - SMALL_NUMEL) * 4 * (size - 1) / size
    return times[0], sent / max(times[1] - times[0], 1e-9)


def _measure_disk(folder: Path) -> tuple[float, float]:
    """(read, write) bytes per second of a file that is flushed; what the page cache gives back is not the disk's."""
    data = os.urandom(1 << 20) * (DISK_NBYTES >> 20)
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=folder) as file:
        start_s = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        write_s = time.perf_counter() - start_s
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start_s = time.perf_counter()
        file.seek(0)
        file.read()
        return DISK_NBYTES / (time.perf_counter() - start_s), DISK_NBYTES / write_s
    return 0.0, 0.0


def undisturbed(seconds: Iterable[float]) -> float:
    """Of many runs of the same thing, what it takes where little else runs: their lower quartile.

    The fastest is too lucky to be met again, and the median is no more the same where half of the runs were disturbed.
    """
    ordered = sorted(seconds)
    return ordered[(len(ordered) - 1) // 4]


def processors() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _take_turns() -> bool:
    """Whether there are more ranks than processors that compute for them."""
    return get_accelerator().device_name() == "cpu" and discover(os.environ).local_size > processors()


def _turns(device: torch.device) -> float:
    """How many times as long ranks compute that take turns, as one that runs."""
    if not _take_turns():
        return 1.0
    a = torch.ones(SIDE, SIDE, device=device)
    return max(1.0, _fastest(lambda: torch.mm(a, a)) / min(_seconds(lambda: torch.mm(a, a), 1) for _ in range(64)))


def _fastest(call: Callable[[], Any]) -> float:
    """Seconds of a call, all ranks' at once."""
    found = min(_seconds_together(call, 1) for _ in range(NUM_RUNS + 1))
    most = torch.tensor(WINDOW_S / found, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)  # messages need as many calls from each
    number = max(1, round(float(most)))
    if not _take_turns():  # a short one is disturbed for all of four runs
        return min(found, *(_seconds_together(call, 1) for _ in range(min(number, MOST_RUNS))))
    return min(_seconds_together(call, number) for _ in range(NUM_WINDOWS))


def _seconds_together(call: Callable[[], Any], number: int) -> float:
    _meet()
    return _seconds(call, number)


def _seconds(call: Callable[[], Any], number: int) -> float:
    """Of one of so many calls in a row."""
    synchronize = get_accelerator().synchronize
    synchronize()
    start_s = time.perf_counter()
    for _ in range(number):
        call()
    synchronize()
    return (time.perf_counter() - start_s) / number


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()

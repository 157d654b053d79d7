"""The peak memory of something that is run: the measure that predictions are held against.

On an accelerator its allocator's own count (`max_memory_allocated`). On a CPU there is none, but torch's CPU allocator
reports every block it hands out and takes back to torch's profiler; their running sum is the same figure: bytes in use
by tensors and by kernels' scratch, without the allocator's slack. The resident set, which the operating system counts in
pages, is given beside it; it also holds what libraries allocate (gloo's buffers, Python).

Note [Frees that nobody reports]
    The profiler sees what threads do that it was started in. Where gloo's own thread is the last to let go of a message,
    which is a race (5 of 30 broadcasts, torch 2.13), that block's end is not in the record. It shows when its address
    is handed out anew, and is counted as ended then.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True)
class Measured:
    """Bytes above what was in use before."""

    allocated_nbytes: int
    """Peak of what the allocator handed out."""
    resident_nbytes: int
    """Growth of the resident set's peak; on an accelerator the reserved memory's."""


def measure_peak(run: Callable[[], Any], *, counts: bool = True) -> Measured:
    """Run something and measure its peak. Tensors that exist before are not counted; those that go are subtracted.

    counts: on a CPU, count allocations; the record of them takes memory too, so for an exact resident set leave it out.
    """
    accelerator = get_accelerator()
    accelerator.synchronize()
    accelerator.reset_peak_memory_stats()
    allocated, reserved = accelerator.memory_allocated(), accelerator.memory_reserved()
    if accelerator.device_name() != "cpu":
        run()
        accelerator.synchronize()
        return Measured(accelerator.max_memory_allocated() - allocated, accelerator.max_memory_reserved() - reserved)
    if not counts:
        run()
        return Measured(0, accelerator.max_memory_allocated() - allocated)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as recorded:
        run()
    resident = accelerator.max_memory_allocated() - allocated
    assert recorded.profiler is not None, "the profiler was started"
    results = recorded.profiler.kineto_results
    assert results is not None, "the profiler was stopped"
    blocks = sorted(_blocks(results.experimental_event_tree()))
    return Measured(peak_of((address, nbytes) for _, address, nbytes in blocks), resident)


def _blocks(tree: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, address, bytes) of every block that comes, and with negative bytes of every block that goes."""
    left = list(tree)
    while left:
        event = left.pop()
        left += event.children
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size


def peak_of(blocks: Iterable[tuple[int, int]]) -> int:
    """The highest sum of bytes in use, from (address, bytes) in the order of time; negative bytes: the block goes.

    See Note [Frees that nobody reports].
    """
    live: dict[int, int] = {}
    addresses: list[int] = []  # of `live`, in order
    total = peak = 0
    for address, nbytes in blocks:
        if nbytes < 0:
            if live.pop(address, None) is not None:
                del addresses[bisect.bisect_left(addresses, address)]
            total += nbytes  # also of a block from before
            continue
        if nbytes == 0:
            continue
        first = bisect.bisect_left(addresses, address)
        if first and addresses[first - 1] + live[addresses[first - 1]] > address:
            first -= 1
        last = bisect.bisect_left(addresses, address + nbytes)
        total -= sum(live.pop(gone) for gone in addresses[first:last])
        addresses[first:last] = [address]
        live[address] = nbytes
        total += nbytes
        peak = max(peak, total)
    return peak

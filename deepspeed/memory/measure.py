"""The peak memory of something that is run: the measure that predictions are held against.

On an accelerator its allocator's own count (`max_memory_allocated`). On a CPU there is none, but torch's CPU allocator
reports every block it hands out and takes back to torch's profiler; their running sum is the same figure: bytes in use
by tensors and by kernels' scratch, without the allocator's slack. The resident set, which the operating system counts in
pages, is given beside it; it also holds what libraries allocate (gloo's buffers, Python).
"""

from __future__ import annotations

from collections.abc import Callable
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
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return Measured(peak, resident)

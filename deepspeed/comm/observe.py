"""ZeRO's verbs as somebody watches them: how often each ran, how many bytes it moved, how long it was waited for.

Asked by `comm.exchange.verb`, through which every verb between ranks goes, while a recorder is configured
(`deepspeed.comm.configure`, section `comms_logger`), which gets a `Flow` per verb and message size, or while waits of a device are
read by its events. Else two readings of the clock per verb are all, and nothing here runs.

Watching does not change what is watched: verbs stay asynchronous, and what is measured is the time a rank stood still
in `wait`. How long a verb takes by itself can therefore not be seen in training; `measure_alone` runs each recorded one
on scratch memory with nothing beside it. Communication is hidden as far as it was waited for less than that.

Invariant: a rank launches and waits for the same things in the same order, watched or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.recorder import Current, Flow, Recorder
from deepspeed.utils.waits import COMMUNICATION

NUM_RUNS = 3
"""Runs of `measure_alone` of which the fastest counts; one more comes before."""

Finish = Callable[[], None]


def wait_of(
    op: str,
    nbytes: int,
    group: ProcessGroup | None,
    verb: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[[Finish], None]:
    """How a verb that was started just now with these arguments is waited for: called with what finishes it."""
    recorder, flow = Current.recorder, None
    device = args[0].device
    if recorder is not None and recorder.wants(op, False):
        alike = tree_map_only(Tensor, _Like.of, (args, kwargs))
        dim = str(getattr(group, "group_desc", ""))
        flow = recorder.flow(op, nbytes, dim, partial(_alone, verb, alike, device))
        flow.count += 1
    if device.type != "cpu" and COMMUNICATION.times_device:
        return partial(_by_events, op, nbytes, flow)
    return partial(_by_the_clock, op, nbytes, flow, recorder)


def _by_events(op: str, nbytes: int, flow: Flow | None, finish: Finish) -> None:
    event = get_accelerator().Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    finish()
    end.record()
    COMMUNICATION.add_events(begin, end)
    COMMUNICATION.add(0.0, op, nbytes)
    if flow is not None:
        flow.waits.add_events(begin, end)


def _by_the_clock(op: str, nbytes: int, flow: Flow | None, recorder: Recorder | None, finish: Finish) -> None:
    start_s = time.perf_counter()
    finish()
    waited_s = time.perf_counter() - start_s
    COMMUNICATION.add(waited_s, op, nbytes)
    if flow is not None and recorder is not None:
        flow.waits.add(waited_s)
        recorder.tell(op, nbytes, waited_s * 1e3, "zero")


def _alone(verb: Callable[..., Any], alike: Any, device: torch.device) -> Finish:
    """A call of one verb on scratch memory like what it was called on."""
    args, kwargs = tree_map_only(_Like, lambda like: like.zeros(device), alike)
    return lambda: verb(*args, **kwargs).wait()


@dataclass(frozen=True, slots=True)
class _Like:
    """What a tensor was like, without keeping it."""

    numel: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        """Of this one."""
        return cls(tensor.numel(), tensor.dtype)

    def zeros(self, device: torch.device) -> Tensor:
        """Another one."""
        return torch.zeros(self.numel, dtype=self.dtype, device=device)


def measure_alone(recorder: Recorder) -> None:
    """Time every recorded verb with nothing beside it, once. Collective over all ranks.

    Takes scratch memory for one message at a time; a message for which a rank has none is left unmeasured on all ranks.
    """
    mine = {key: flow for key, flow in recorder.flows.items() if flow.alone_s is None}
    for key in sorted(set.intersection(*_of_ranks(set(mine)))):
        call = _or_none(mine[key].make_call)
        if all(_of_ranks(call is not None)) and call is not None:
            mine[key].alone_s = _fastest(call)


def _of_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _or_none(make: Callable[[], Callable[[], None]]) -> Callable[[], None] | None:
    try:
        return make()
    except (RuntimeError, MemoryError):  # out of memory, in torch's several classes of it
        return None


def _fastest(call: Callable[[], None]) -> float:
    synchronize = get_accelerator().synchronize
    times: list[float] = []
    for _ in range(NUM_RUNS + 1):
        dist.barrier()
        synchronize()
        start_s = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start_s)
    return min(times[1:])


def hidden_share(flows: Iterable[Flow]) -> float | None:
    """The part of all communication time that was not waited for, from 0 to 1; None where nothing was measured alone."""
    known = [flow for flow in flows if flow.alone_s is not None and flow.count]
    total_s = sum(flow.count * (flow.alone_s or 0.0) for flow in known)
    exposed_s = sum(min(flow.waits.seconds, flow.count * (flow.alone_s or 0.0)) for flow in known)
    return 1 - exposed_s / total_s if total_s > 0 else None

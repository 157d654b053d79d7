"""An exchange that is watched: how often each verb ran, how many bytes it moved, how long it was waited for.

`mesh` wraps every exchange between ranks; `zero` does not know. Always on are two readings of the clock per verb, for
the progress line. While a recorder is configured (`deepspeed.comm.configure`, section `comms_logger`) it also gets a
`Flow` per verb and message size.

Watching does not change what is watched: verbs stay asynchronous, and what is measured is the time a rank stood still
in `wait`. How long a verb takes by itself can therefore not be seen in training; `measure_alone` runs each recorded one
on scratch memory with nothing beside it. Communication is hidden as far as it was waited for less than that.

Invariant: a rank launches and waits for the same things in the same order, watched or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map_only

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.choose import make_exchange, sharing_of
from deepspeed.comm.exchange import Exchange, Pending
from deepspeed.comm.recorder import Current, Flow, Recorder
from deepspeed.utils.waits import COMMUNICATION

NUM_RUNS = 3
"""Runs of `measure_alone` of which the fastest counts; one more comes before."""


def make_observed(group: ProcessGroup | None, device: torch.device, until: ExitStack | None = None) -> Exchange:
    """`make_exchange`, watched where there is more than one rank; through shared memory as the environment asks for it.
    Collective over the group."""
    inner = make_exchange(group, device, sharing=sharing_of(os.environ), until=until)
    return cast(Exchange, ObservedExchange(inner, device)) if inner.world_size > 1 else inner


@final
class ObservedExchange:
    """An exchange whose verbs, `start_...`, are each watched; whatever verbs it has. Everything else is passed on."""

    def __init__(self, inner: Exchange, device: torch.device) -> None:
        self.inner = inner
        self._device = device
        self._dim = str(getattr(inner.group, "group_desc", ""))
        self._event = None if device.type == "cpu" else get_accelerator().Event
        for name in dir(inner):
            if name.startswith("start_"):
                op = f"zero.{name.removeprefix('start_')}"
                setattr(self, name, partial(self._watch, op, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        """See Exchange. It waits, so the whole call is the wait."""
        with COMMUNICATION.during("zero.broadcast", full.nbytes):
            self.inner.broadcast(full, source)

    def _watch(self, op: str, verb: Callable[..., Pending], full: Tensor, *args: Any, **kwargs: Any) -> Pending:
        """Start a verb on `full` and have its wait timed."""
        nbytes = full.nbytes  # before: a verb may give the storage away
        pending = verb(full, *args, **kwargs)
        recorder, flow = Current.recorder, None
        if recorder is not None and recorder.wants(op, False):
            call = (full, *args), kwargs
            alike = tree_map_only(Tensor, _Like.of, call)
            flow = recorder.flow(op, nbytes, self._dim, partial(self._alone, verb, alike))
            flow.count += 1
        return pending.within(partial(self._timed, op, nbytes, flow, recorder))

    def _timed(
        self, op: str, nbytes: int, flow: Flow | None, recorder: Recorder | None, finish: Callable[[], None]
    ) -> None:
        if self._event is not None and COMMUNICATION.times_device:
            begin, end = self._event(enable_timing=True), self._event(enable_timing=True)
            begin.record()
            finish()
            end.record()
            COMMUNICATION.add_events(begin, end)
            COMMUNICATION.add(0.0, op, nbytes)
            if flow is not None:
                flow.waits.add_events(begin, end)
            return
        start_s = time.perf_counter()
        finish()
        waited_s = time.perf_counter() - start_s
        COMMUNICATION.host_s += waited_s
        COMMUNICATION.nbytes[op] += nbytes
        if flow is not None and recorder is not None:
            flow.waits.add(waited_s)
            recorder.tell(op, nbytes, waited_s * 1e3, "zero")

    def _alone(self, verb: Callable[..., Pending], alike: Any) -> Callable[[], None]:
        """A call of one verb on scratch memory like what it was called on."""
        args, kwargs = tree_map_only(_Like, lambda like: like.zeros(self._device), alike)
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

"""Collectives between simulated devices: torch.distributed's backend "sim", with NCCL's manners over gloo.

`init_process_group("sim")` makes a `SimGroup`. As with NCCL a collective is queued on a stream of the group, ordered after the
current stream; `wait` orders the current stream after it and does not hold the host up; sums of bf16 and fp16 are made in
fp32, in rank order. Until it ran its results are poison. Tensors on the CPU go to gloo as they are.

What is sent is read when the collective is queued, because a rank that queued it may wait for its peers in other ways and nobody
would send for it; what is received lands as late as time allows (see `csrc/runtime.h`).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from tests.device.sim import NAME, native

Finish = Callable[[], None]
Begin = Callable[[], tuple[list[Any], Finish]]
"""Starts gloo; gives its works, and what puts their results in place."""

NARROW = (torch.bfloat16, torch.float16)


def register() -> None:
    """Tell torch.distributed of the backend. Once per process."""
    native().sim_on_work(_run, _is_ready)
    dist.Backend.register_backend(NAME, SimGroup, devices=[NAME])


_queued: dict[int, tuple[list[Any], Finish]] = {}
_keys = itertools.count()
errors: list[BaseException] = []
"""What collectives raised while they ran for somebody who cannot raise."""


@ctypes.CFUNCTYPE(None, ctypes.c_int64)
def _run(key: int) -> None:
    works, finish = _queued.pop(key)
    try:
        for work in works:
            work.wait()
        finish()
    except BaseException as error:  # a C function called us
        errors.append(error)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64)
def _is_ready(key: int) -> int:
    return int(key not in _queued or all(work.is_completed() for work in _queued[key][0]))


class SimWork(dist.Work):
    """A collective that was queued. It keeps its tensors until the current stream has been told to wait for it."""

    def __init__(self, event: torch.Event, kept: Sequence[Tensor]) -> None:
        super().__init__()
        self._event = event
        self._kept = list(kept)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Order the current stream after the collective."""
        torch.sim.current_stream().wait_event(self._event)
        self._kept.clear()
        return True

    def synchronize(self) -> None:
        """The same."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it ran."""
        return bool(self._event.query())


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.ops.sim.as_cpu(tensor)


def _sent(tensor: Tensor) -> Tensor:
    """What goes on the wire: a copy, flat if it has to be."""
    return _bytes_of(tensor).contiguous().clone()


def _combine(parts: Sequence[Tensor], op: Any) -> Tensor:
    """One tensor of all ranks', in rank order."""
    kind = op.op if hasattr(op, "op") else op
    dtype = parts[0].dtype
    wide = [part.float() for part in parts] if dtype in NARROW else list(parts)
    pairwise = {ReduceOp.MAX: torch.maximum, ReduceOp.MIN: torch.minimum, ReduceOp.PRODUCT: torch.mul}
    total = functools.reduce(pairwise.get(kind, torch.add), wide)
    return (total / len(parts) if kind == ReduceOp.AVG else total).to(dtype)


class SimGroup(dist.ProcessGroup):
    """One process group; see the module's text."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo/", store), rank, size, timeout=timeout)
        self._streams: dict[int, torch.Stream] = {}
        self._name = self._description = ""

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        """ "sim"."""
        return NAME

    @property
    def group_name(self) -> str:
        """As torch named it."""
        return self._name

    @property
    def group_desc(self) -> str:
        """What the group is for."""
        return self._description

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(NAME)]

    def shutdown(self) -> None:
        """Nothing runs on its own."""

    # -- one verb

    def _start(self, name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], begin: Begin) -> SimWork:
        if errors:
            raise errors.pop()
        device = (*reads, *writes)[0].device.index
        stream = self._streams.setdefault(device, torch.Stream(device=torch.device(NAME, device)))
        current = torch.sim.current_stream(device)
        native().sim_drain(device, current.stream_id)
        works, finish = begin()
        key = next(_keys)
        _queued[key] = (works, finish)
        stream.wait_stream(current)
        with torch.sim.stream(stream):
            torch.ops.sim.host_work(list(reads), list(writes), f"{self.group_desc or 'group'}.{name}", key)
            event = torch.Event(NAME)
            event.record()
        return SimWork(event, [*reads, *writes])

    def _gather_parts(self, tensor: Tensor) -> tuple[list[Any], list[Tensor]]:
        mine = _sent(tensor)
        parts = [torch.empty_like(mine) for _ in range(self._size)]
        return [self._gloo.allgather([parts], [mine])], parts

    def _swap(self, sent: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]]:
        """Send sent[r] to rank r; what rank r sends has the shape of like[r]."""
        out = torch.cat([t.reshape(-1) for t in sent])
        into = torch.empty(sum(t.numel() for t in like), dtype=out.dtype)
        work = self._gloo.alltoall_base(into, out, [t.numel() for t in like], [t.numel() for t in sent])
        return [work], list(into.split([t.numel() for t in like]))

    # -- the collectives, as torch.distributed calls them

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        (tensor,) = tensors
        if tensor.device.type == "cpu":
            return self._gloo.allreduce(tensors, opts)
        op = opts.reduceOp if opts is not None else ReduceOp.SUM

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._gather_parts(tensor)
            into = _bytes_of(tensor)
            return works, lambda: _put(into, _combine(parts, op))

        return self._start("all_reduce", [tensor], [tensor], begin)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        (tensor,) = tensors
        if tensor.device.type == "cpu":
            return self._gloo.reduce(tensors, opts)

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._gather_parts(tensor)
            into = _bytes_of(tensor)
            return works, lambda: _put(
                into, _combine(parts, opts.reduceOp) if self._rank == opts.rootRank else parts[self._rank]
            )

        return self._start("reduce", [tensor], [tensor], begin)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        (tensor,) = tensors
        if tensor.device.type == "cpu":
            return self._gloo.broadcast(tensors, opts)

        def begin() -> tuple[list[Any], Finish]:
            wire, into = _sent(tensor), _bytes_of(tensor)
            return [self._gloo.broadcast([wire], opts)], lambda: _put(into, wire)

        return self._start("broadcast", [tensor], [tensor], begin)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        (into,), (tensor,) = outputs, inputs
        if tensor.device.type == "cpu":
            return self._gloo.allgather(outputs, inputs)

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._gather_parts(tensor)
            targets = [_bytes_of(t) for t in into]
            return works, lambda: _put_all(targets, parts)

        return self._start("all_gather", [tensor], into, begin)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        if tensor.device.type == "cpu":
            return self._gloo._allgather_base(output, tensor)

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._gather_parts(tensor)
            into = _bytes_of(output)
            return works, lambda: _put(into, torch.cat([part.reshape(-1) for part in parts]))

        return self._start("all_gather", [tensor], [output], begin)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> Any:
        if tensor.device.type == "cpu":
            return self._gloo._reduce_scatter_base(output, tensor, opts)

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._swap(_sent(tensor).reshape(-1).chunk(self._size), [output] * self._size)
            into = _bytes_of(output)
            return works, lambda: _put(into, _combine(parts, opts.reduceOp))

        return self._start("reduce_scatter", [tensor], [output], begin)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Any:
        (output,), (tensors,) = outputs, inputs
        if output.device.type == "cpu":
            return self._gloo.reduce_scatter(outputs, inputs, opts)

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._swap([_sent(tensor) for tensor in tensors], [output] * self._size)
            into = _bytes_of(output)
            return works, lambda: _put(into, _combine(parts, opts.reduceOp))

        return self._start("reduce_scatter", tensors, [output], begin)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Any:
        (tensor,) = inputs
        if tensor.device.type == "cpu":
            return self._gloo.gather(outputs, inputs, opts)

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._gather_parts(tensor)
            targets = [_bytes_of(t) for t in outputs[0]] if outputs else []
            return works, lambda: _put_all(targets, parts) if targets else None

        return self._start("gather", [tensor], outputs[0] if outputs else [], begin)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Any:
        (output,) = outputs
        if output.device.type == "cpu":
            return self._gloo.scatter(outputs, inputs, opts)

        def begin() -> tuple[list[Any], Finish]:
            wire, into = _sent(output), _bytes_of(output)
            work = self._gloo.scatter([wire], [[_sent(t) for t in inputs[0]]] if inputs else [], opts)
            return [work], lambda: _put(into, wire)

        return self._start("scatter", inputs[0] if inputs else [], [output], begin)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        if inputs[0].device.type == "cpu":
            return self._gloo.alltoall(outputs, inputs)

        def begin() -> tuple[list[Any], Finish]:
            works, parts = self._swap([_sent(tensor) for tensor in inputs], outputs)
            targets = [_bytes_of(t) for t in outputs]
            return works, lambda: _put_all(targets, parts)

        return self._start("all_to_all", inputs, outputs, begin)

    def all_to_all_single(self, output: Tensor, tensor: Tensor, into: Any, sent: Any, opts: Any = None) -> Any:
        if tensor.device.type == "cpu":
            return self._gloo.alltoall_base(output, tensor, into, sent)
        outputs = output.split(list(into)) if into else output.chunk(self._size)
        inputs = tensor.split(list(sent)) if sent else tensor.chunk(self._size)
        return self.alltoall(list(outputs), list(inputs), opts)

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        (tensor,) = tensors
        if tensor.device.type == "cpu":
            return self._gloo.send(tensors, peer, tag)
        return self._start("send", [tensor], [], lambda: ([self._gloo.send([_sent(tensor)], peer, tag)], lambda: None))

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        (tensor,) = tensors
        if tensor.device.type == "cpu":
            return self._gloo.recv(tensors, peer, tag)

        def begin() -> tuple[list[Any], Finish]:
            into = _bytes_of(tensor)
            wire = torch.empty_like(into)
            return [self._gloo.recv([wire], peer, tag)], lambda: _put(into, wire)

        return self._start("recv", [], [tensor], begin)

    def barrier(self, opts: Any = None) -> Any:
        """As NCCL's: the host waits for the device, and then for the other ranks."""
        torch.sim.synchronize()
        return self._gloo.barrier()


def _put(into: Tensor, value: Tensor) -> None:
    """Write to memory that was taken when the collective was queued: the storage may have been given other memory since."""
    into.copy_(value.view(into.shape))


def _put_all(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        _put(tensor, value)

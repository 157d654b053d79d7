"""The collectives of torch.distributed under the names and with the arguments of the public contract.

`deepspeed.comm` re-exports them; user code and libraries call them there in place of `torch.distributed`. Each is one
line; `_recorded` gives it the extra keywords and passes it through `run`, where a recorder can count and time it.

The extra keywords of every collective, also by position, after its own: `prof` records this call even where only listed
operations are recorded, `log_name` names it in the record, `debug` says who called. They mean nothing while nothing is
recorded.

Invariant: without a recorder, a collective waits for nothing and allocates no tensor beyond torch's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, ReduceOp

from deepspeed.comm.collective import all_gather_single, reduce_scatter_single
from deepspeed.comm.recorder import Current

Group = ProcessGroup | None
SUM = ReduceOp.SUM
Collective = Callable[..., Any]


def run(
    call: Collective,
    message: Tensor | Sequence[Tensor] | None,
    prof: bool,
    log_name: str,
    debug: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`call(*args, **kwargs)`, recorded if something records. `message` is the tensor, or tensors, whose bytes count."""
    recorder = Current.recorder
    if recorder is None or not recorder.wants(log_name, prof):
        return call(*args, **kwargs)
    tensors = [message] if isinstance(message, Tensor) else message or []
    return recorder.timed(lambda: call(*args, **kwargs), log_name, sum(t.nbytes for t in tensors), debug or "user code")


def _extras_of(name: str) -> Callable[..., tuple[bool, str, str | None]]:
    def extras(prof: bool = False, log_name: str = name, debug: str | None = None) -> tuple[bool, str, str | None]:
        return prof, log_name, debug

    return extras


def _extended(collective: Collective) -> Collective:
    """The collective with the extra keywords, which it does not see; never recorded."""
    return _recorded(None, never=True)(collective)


def _recorded(message: str | None = None, *, never: bool = False) -> Callable[[Collective], Collective]:
    """The collective with the extra keywords, recorded with the bytes of its argument `message` (None: no bytes)."""

    def extend(collective: Collective) -> Collective:
        extras = _extras_of(collective.__name__)
        added = inspect.signature(extras)
        own = inspect.signature(collective)
        num_own = len(own.parameters)
        index = list(own.parameters).index(message) if message is not None else 0

        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = {key: kwargs.pop(key) for key in added.parameters if key in kwargs}
            prof, log_name, debug = extras(*args[num_own:], **given)
            args = args[:num_own]
            if never:
                return collective(*args, **kwargs)
            counted = None if message is None else args[index] if index < len(args) else kwargs.get(message)
            return run(collective, counted, prof, log_name, debug, *args, **kwargs)

        call.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[*own.parameters.values(), *added.parameters.values()]
        )
        call.__annotations__ = {**extras.__annotations__, **collective.__annotations__}
        return call

    return extend


class Handles:
    """Several operations in flight as one."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = [handle for handle in handles if handle is not None]

    def wait(self) -> None:
        """Wait for all of them."""
        for handle in self._handles:
            handle.wait()

    def is_completed(self) -> bool:
        """Whether all of them are done."""
        return all(handle.is_completed() for handle in self._handles)


def _together(call: Collective, calls: Sequence[tuple[Any, ...]], async_op: bool, **kwargs: Any) -> Any:
    handles = Handles([call(*args, async_op=True, **kwargs) for args in calls])
    if async_op:
        return handles
    handles.wait()
    return None


@_recorded("tensor")
def broadcast(tensor: Tensor, src: int, group: Group = None, async_op: bool = False) -> Any:
    """Give every rank the values of global rank `src`."""
    return dist.broadcast(tensor, src=src, group=group, async_op=async_op)


def broadcast_object_list(
    object_list: list[Any], src: int, group: Group = None, device: torch.device | None = None
) -> None:
    """Give every rank the picklable objects of global rank `src`."""
    dist.broadcast_object_list(object_list, src=src, group=group, device=device)


@_recorded("tensor_list")
def all_gather(tensor_list: list[Tensor], tensor: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """Fill `tensor_list` with every rank's `tensor`."""
    return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)


@_recorded("output_tensor")
def all_gather_into_tensor(output_tensor: Tensor, tensor: Tensor, group: Group = None, async_op: bool = False) -> Any:
    """Fill `output_tensor` [world_size * n] with every rank's `tensor` [n], in rank order."""
    return all_gather_single(output_tensor, tensor, group=group, async_op=async_op)


def all_gather_object(object_list: list[Any], obj: Any, group: Group = None) -> None:
    """Fill `object_list` with every rank's picklable object."""
    dist.all_gather_object(object_list, obj, group=group)


@_recorded("output_tensors")
def all_gather_coalesced(
    output_tensors: Sequence[Tensor], input_tensors: Sequence[Tensor], group: Group = None, async_op: bool = False
) -> Any:
    """all_gather_into_tensor of several pairs, all in flight at once."""
    return _together(all_gather_single, list(zip(output_tensors, input_tensors, strict=True)), async_op, group=group)


def allgather_fn(
    output_tensor: Tensor, input_tensor: Tensor, group: Group = None, async_op: bool = False, debug: str | None = None
) -> Any:
    """all_gather_into_tensor under its older name."""
    return all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op, debug=debug)


@_recorded("input_list")
def reduce_scatter(
    output: Tensor, input_list: list[Tensor], op: Any = SUM, group: Group = None, async_op: bool = False
) -> Any:
    """Reduce input_list[r] over ranks into rank r's `output`."""
    try:
        return dist.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
    except RuntimeError as error:
        # gloo of torch 2.6 refuses lists before it sends anything, on every rank; one tensor it takes.
        if "does not support reduce_scatter" not in str(error) or len({part.numel() for part in input_list}) != 1:
            raise
    flat = torch.cat([part.reshape(-1) for part in input_list])
    return reduce_scatter_single(output.view(-1), flat, op=op, group=group, async_op=async_op)


@_recorded("tensor")
def reduce_scatter_tensor(
    output_tensor: Tensor, tensor: Tensor, op: Any = SUM, group: Group = None, async_op: bool = False
) -> Any:
    """Reduce `tensor` [world_size * n] over ranks, this rank's piece into `output_tensor` [n]."""
    return reduce_scatter_single(output_tensor, tensor, op=op, group=group, async_op=async_op)


def reduce_scatter_fn(
    output_tensor: Tensor,
    tensor: Tensor,
    op: Any = SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    debug: str | None = None,
) -> Any:
    """reduce_scatter_tensor under its older name."""
    return reduce_scatter_tensor(output_tensor, tensor, op=op, group=group, async_op=async_op, prof=prof, debug=debug)


@_recorded("tensor")
def all_reduce(tensor: Tensor, op: Any = SUM, group: Group = None, async_op: bool = False) -> Any:
    """Reduce over ranks, in place."""
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


@_recorded("tensor")
def inference_all_reduce(tensor: Tensor, op: Any = SUM, group: Group = None, async_op: bool = False) -> Any:
    """all_reduce, recorded apart from training's."""
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


@_recorded("tensors")
def all_reduce_coalesced(tensors: Sequence[Tensor], op: Any = SUM, group: Group = None, async_op: bool = False) -> Any:
    """all_reduce of several tensors, all in flight at once."""
    return _together(dist.all_reduce, [(tensor,) for tensor in tensors], async_op, op=op, group=group)


@_recorded("tensor")
def all_to_all_single(
    output: Tensor,
    tensor: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
) -> Any:
    """Send piece r of `tensor` to rank r; `output` receives one piece of every rank, in rank order."""
    return dist.all_to_all_single(
        output,
        tensor,
        output_split_sizes=output_split_sizes,
        input_split_sizes=input_split_sizes,
        group=group,
        async_op=async_op,
    )


@_recorded("input_tensor_list")
def all_to_all(
    output_tensor_list: list[Tensor], input_tensor_list: list[Tensor], group: Group = None, async_op: bool = False
) -> Any:
    """Send input_tensor_list[r] to rank r; output_tensor_list[r] comes from it."""
    return dist.all_to_all(output_tensor_list, input_tensor_list, group=group, async_op=async_op)


@_recorded("tensor")
def send(tensor: Tensor, dst: int, group: Group = None, tag: int = 0) -> None:
    """Send to global rank `dst`."""
    return dist.send(tensor, dst, group=group, tag=tag)


@_recorded("tensor")
def recv(tensor: Tensor, src: int | None = None, group: Group = None, tag: int = 0) -> Any:
    """Receive from global rank `src`, or from whoever sends; returns the sender's rank."""
    return dist.recv(tensor, src, group=group, tag=tag)


@_extended
def isend(tensor: Tensor, dst: int, group: Group = None, tag: int = 0) -> Any:
    """Start sending to global rank `dst`. Never recorded: the other side may not have started."""
    return dist.isend(tensor, dst, group=group, tag=tag)


@_extended
def irecv(tensor: Tensor, src: int | None = None, group: Group = None, tag: int = 0) -> Any:
    """Start receiving from global rank `src`. Never recorded: the other side may not have started."""
    return dist.irecv(tensor, src, group=group, tag=tag)


@_extended
def batch_isend_irecv(p2p_op_list: list[P2POp]) -> Any:
    """Start several sends and receives."""
    return dist.batch_isend_irecv(p2p_op_list)


@_recorded("tensor")
def gather(
    tensor: Tensor, gather_list: list[Tensor] | None = None, dst: int = 0, group: Group = None, async_op: bool = False
) -> Any:
    """Fill global rank `dst`'s gather_list with every rank's `tensor`."""
    return dist.gather(tensor, gather_list=gather_list, dst=dst, group=group, async_op=async_op)


@_recorded("tensor")
def scatter(
    tensor: Tensor, scatter_list: list[Tensor] | None = None, src: int = 0, group: Group = None, async_op: bool = False
) -> Any:
    """Give rank r scatter_list[r] of global rank `src`."""
    return dist.scatter(tensor, scatter_list=scatter_list, src=src, group=group, async_op=async_op)


@_recorded("tensor")
def reduce(tensor: Tensor, dst: int, op: Any = SUM, group: Group = None, async_op: bool = False) -> Any:
    """Reduce over ranks into global rank `dst`'s tensor."""
    return dist.reduce(tensor, dst, op=op, group=group, async_op=async_op)


@_recorded()
def barrier(group: Group = None, async_op: bool = False, device_ids: list[int] | None = None) -> Any:
    """Return once every rank has called it."""
    return dist.barrier(group=group, async_op=async_op, device_ids=device_ids)


@_recorded()
def monitored_barrier(group: Group = None, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> Any:
    """A gloo barrier that names the ranks that did not come."""
    return dist.monitored_barrier(group=group, timeout=timeout, wait_all_ranks=wait_all_ranks)

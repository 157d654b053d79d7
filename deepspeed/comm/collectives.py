"""The collectives of torch.distributed under the names and with the arguments of the public contract.

`deepspeed.comm` re-exports them; user code and libraries call them there in place of `torch.distributed`. Each is one
line over `run`, the only place through which they all pass, where a recorder can count and time them.

The extra keywords of every collective: `prof` records this call even where only listed operations are recorded,
`log_name` names it in the record, `debug` says who called. They mean nothing while nothing is recorded.

Invariant: without a recorder, `run` adds one function call and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, ReduceOp

from deepspeed.comm.collective import all_gather_single, reduce_scatter_single
from deepspeed.comm.observe import measure_alone
from deepspeed.comm.recorder import Current, Recorder, straggling_ms, table

Group = ProcessGroup | None
SUM = ReduceOp.SUM


def run(
    call: Callable[..., Any],
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


def _together(call: Callable[..., Any], calls: Sequence[tuple[Any, ...]], async_op: bool, **kwargs: Any) -> Any:
    handles = Handles([call(*args, async_op=True, **kwargs) for args in calls])
    if async_op:
        return handles
    handles.wait()
    return None


def broadcast(
    tensor: Tensor,
    src: int,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "broadcast",
    debug: str | None = None,
) -> Any:
    """Give every rank the values of global rank `src`."""
    return run(dist.broadcast, tensor, prof, log_name, debug, tensor, src=src, group=group, async_op=async_op)


def broadcast_object_list(
    object_list: list[Any], src: int, group: Group = None, device: torch.device | None = None
) -> None:
    """Give every rank the picklable objects of global rank `src`."""
    dist.broadcast_object_list(object_list, src=src, group=group, device=device)


def all_gather(
    tensor_list: list[Tensor],
    tensor: Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_gather",
    debug: str | None = None,
) -> Any:
    """Fill `tensor_list` with every rank's `tensor`."""
    return run(dist.all_gather, tensor_list, prof, log_name, debug, tensor_list, tensor, group=group, async_op=async_op)


def all_gather_into_tensor(
    output_tensor: Tensor,
    tensor: Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_gather_into_tensor",
    debug: str | None = None,
) -> Any:
    """Fill `output_tensor` [world_size * n] with every rank's `tensor` [n], in rank order."""
    return run(
        all_gather_single, output_tensor, prof, log_name, debug, output_tensor, tensor, group=group, async_op=async_op
    )


def all_gather_object(object_list: list[Any], obj: Any, group: Group = None) -> None:
    """Fill `object_list` with every rank's picklable object."""
    dist.all_gather_object(object_list, obj, group=group)


def all_gather_coalesced(
    output_tensors: Sequence[Tensor],
    input_tensors: Sequence[Tensor],
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_gather_coalesced",
    debug: str | None = None,
) -> Any:
    """all_gather_into_tensor of several pairs, all in flight at once."""
    return run(
        _together,
        output_tensors,
        prof,
        log_name,
        debug,
        all_gather_single,
        list(zip(output_tensors, input_tensors, strict=True)),
        async_op,
        group=group,
    )


def allgather_fn(
    output_tensor: Tensor, input_tensor: Tensor, group: Group = None, async_op: bool = False, debug: str | None = None
) -> Any:
    """all_gather_into_tensor under its older name."""
    return all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op, debug=debug)


def reduce_scatter(
    output: Tensor,
    input_list: list[Tensor],
    op: Any = SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "reduce_scatter",
    debug: str | None = None,
) -> Any:
    """Reduce input_list[r] over ranks into rank r's `output`."""
    return run(
        dist.reduce_scatter,
        input_list,
        prof,
        log_name,
        debug,
        output,
        input_list,
        op=op,
        group=group,
        async_op=async_op,
    )


def reduce_scatter_tensor(
    output_tensor: Tensor,
    tensor: Tensor,
    op: Any = SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "reduce_scatter_tensor",
    debug: str | None = None,
) -> Any:
    """Reduce `tensor` [world_size * n] over ranks, this rank's piece into `output_tensor` [n]."""
    return run(
        reduce_scatter_single,
        tensor,
        prof,
        log_name,
        debug,
        output_tensor,
        tensor,
        op=op,
        group=group,
        async_op=async_op,
    )


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


def all_reduce(
    tensor: Tensor,
    op: Any = SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_reduce",
    debug: str | None = None,
) -> Any:
    """Reduce over ranks, in place."""
    return run(dist.all_reduce, tensor, prof, log_name, debug, tensor, op=op, group=group, async_op=async_op)


def inference_all_reduce(
    tensor: Tensor,
    op: Any = SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "inference_all_reduce",
    debug: str | None = None,
) -> Any:
    """all_reduce, recorded apart from training's."""
    return run(dist.all_reduce, tensor, prof, log_name, debug, tensor, op=op, group=group, async_op=async_op)


def all_reduce_coalesced(
    tensors: Sequence[Tensor],
    op: Any = SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_reduce_coalesced",
    debug: str | None = None,
) -> Any:
    """all_reduce of several tensors, all in flight at once."""
    return run(
        _together,
        tensors,
        prof,
        log_name,
        debug,
        dist.all_reduce,
        [(tensor,) for tensor in tensors],
        async_op,
        op=op,
        group=group,
    )


def all_to_all_single(
    output: Tensor,
    tensor: Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_to_all_single",
    debug: str | None = None,
) -> Any:
    """Send piece r of `tensor` to rank r; `output` receives one piece of every rank, in rank order."""
    return run(
        dist.all_to_all_single,
        tensor,
        prof,
        log_name,
        debug,
        output,
        tensor,
        output_split_sizes=output_split_sizes,
        input_split_sizes=input_split_sizes,
        group=group,
        async_op=async_op,
    )


def all_to_all(
    output_tensor_list: list[Tensor],
    input_tensor_list: list[Tensor],
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "all_to_all",
    debug: str | None = None,
) -> Any:
    """Send input_tensor_list[r] to rank r; output_tensor_list[r] comes from it."""
    return run(
        dist.all_to_all,
        input_tensor_list,
        prof,
        log_name,
        debug,
        output_tensor_list,
        input_tensor_list,
        group=group,
        async_op=async_op,
    )


def send(
    tensor: Tensor,
    dst: int,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = "send",
    debug: str | None = None,
) -> None:
    """Send to global rank `dst`."""
    return run(dist.send, tensor, prof, log_name, debug, tensor, dst, group=group, tag=tag)


def recv(
    tensor: Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = "recv",
    debug: str | None = None,
) -> Any:
    """Receive from global rank `src`, or from whoever sends; returns the sender's rank."""
    return run(dist.recv, tensor, prof, log_name, debug, tensor, src, group=group, tag=tag)


def isend(
    tensor: Tensor,
    dst: int,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = "isend",
    debug: str | None = None,
) -> Any:
    """Start sending to global rank `dst`. Never recorded: the other side may not have started."""
    return dist.isend(tensor, dst, group=group, tag=tag)


def irecv(
    tensor: Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str = "irecv",
    debug: str | None = None,
) -> Any:
    """Start receiving from global rank `src`. Never recorded: the other side may not have started."""
    return dist.irecv(tensor, src, group=group, tag=tag)


def batch_isend_irecv(
    p2p_op_list: list[P2POp], prof: bool = False, log_name: str = "batch_isend_irecv", debug: str | None = None
) -> Any:
    """Start several sends and receives."""
    return dist.batch_isend_irecv(p2p_op_list)


def gather(
    tensor: Tensor,
    gather_list: list[Tensor] | None = None,
    dst: int = 0,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "gather",
    debug: str | None = None,
) -> Any:
    """Fill global rank `dst`'s gather_list with every rank's `tensor`."""
    return run(
        dist.gather,
        tensor,
        prof,
        log_name,
        debug,
        tensor,
        gather_list=gather_list,
        dst=dst,
        group=group,
        async_op=async_op,
    )


def scatter(
    tensor: Tensor,
    scatter_list: list[Tensor] | None = None,
    src: int = 0,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "scatter",
    debug: str | None = None,
) -> Any:
    """Give rank r scatter_list[r] of global rank `src`."""
    return run(
        dist.scatter,
        tensor,
        prof,
        log_name,
        debug,
        tensor,
        scatter_list=scatter_list,
        src=src,
        group=group,
        async_op=async_op,
    )


def reduce(
    tensor: Tensor,
    dst: int,
    op: Any = SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str = "reduce",
    debug: str | None = None,
) -> Any:
    """Reduce over ranks into global rank `dst`'s tensor."""
    return run(dist.reduce, tensor, prof, log_name, debug, tensor, dst, op=op, group=group, async_op=async_op)


def barrier(
    group: Group = None,
    async_op: bool = False,
    device_ids: list[int] | None = None,
    prof: bool = False,
    log_name: str = "barrier",
    debug: str | None = None,
) -> Any:
    """Return once every rank has called it."""
    return run(dist.barrier, None, prof, log_name, debug, group=group, async_op=async_op, device_ids=device_ids)


def monitored_barrier(
    group: Group = None,
    timeout: timedelta | None = None,
    wait_all_ranks: bool = False,
    prof: bool = False,
    log_name: str = "monitored_barrier",
    debug: str | None = None,
) -> Any:
    """A gloo barrier that names the ranks that did not come."""
    return run(
        dist.monitored_barrier, None, prof, log_name, debug, group=group, timeout=timeout, wait_all_ranks=wait_all_ranks
    )


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: Sequence[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Start, change or stop recording collectives: from the config's `comms_logger` section, then from the arguments."""
    section = getattr(deepspeed_config, "comms_logger", None)
    before = Current.recorder
    if enabled is None:
        enabled = section.enabled if section is not None else before is not None
    recorder = before or Recorder()
    given = {"prof_all": prof_all, "prof_ops": prof_ops, "verbose": verbose, "debug": debug}
    for name, value in given.items():
        if value is None and section is not None:
            value = getattr(section, name)
        if value is not None:
            setattr(recorder, name, value)
    Current.recorder = recorder if enabled else None


def log_summary(show_straggler: bool = False, return_dict: bool = False) -> dict[str, Any] | None:
    """Print on rank 0 what was recorded; with `return_dict`, return this rank's numbers. Collective.

    ZeRO's own traffic is asynchronous: its latency is measured here, on scratch memory with nothing beside it, at the first
    call for each message size. The dict: "summary" -> op -> message bytes -> numbers, "straggler_analysis" (None unless
    asked for: milliseconds this rank waited longer than the rank that waited least), "metadata".
    """
    recorder = Current.recorder or Recorder()
    dist.barrier()
    measure_alone(recorder)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    summary = recorder.summary(world_size)
    straggling = straggling_ms(summary) if show_straggler else {}
    if rank == 0:
        print(table(summary, straggling), flush=True)
    if not return_dict:
        return None
    return {
        "summary": summary,
        "straggler_analysis": straggling if show_straggler else None,
        "metadata": {"world_size": world_size, "rank": rank, "timestamp": datetime.now(timezone.utc).isoformat()},
    }


def reset_log() -> None:
    """Forget what was recorded; go on recording."""
    if Current.recorder is not None:
        Current.recorder.clear()


def has_comm_data() -> bool:
    """Whether anything was recorded."""
    return get_comm_operation_count() > 0


def get_comm_operation_count() -> int:
    """How many operations were recorded."""
    recorder = Current.recorder or Recorder()
    timed = sum(len(latencies) for sizes in recorder.records.values() for latencies in sizes.values())
    return timed + sum(flow.count for flow in recorder.flows.values())


def get_logged_comm_ops() -> list[str]:
    """The names of the recorded operations."""
    recorder = Current.recorder or Recorder()
    return list(dict.fromkeys([*recorder.records, *(op for (op, _, _), flow in recorder.flows.items() if flow.count)]))

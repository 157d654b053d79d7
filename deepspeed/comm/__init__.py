"""Communication: `deepspeed.comm` stands in for `torch.distributed`, and more.

    init.py          start or adopt torch.distributed; ranks and groups
    collectives.py   the collectives, through one function where they can be recorded
    recorder.py  log.py   counts, times, bandwidths; what a script asks of them
    watchdog.py      who is missing while a collective waits        interrupts.py   Ctrl-C, at one place on all ranks
    exchange.py      ZeRO's all-gather, reduce-scatter and all-reduce on flat buffers, as a protocol; what messages are received
                     into; agreements on a few integers
    local.py  collective.py  direct.py     the exchanges: one rank, torch's collectives, gloo from rank to rank (integers too)
    shared.py        the one between ranks of a host, and the boards that they share; counters.py: what is compiled of it
    secondary.py     an exchange that keeps a copy near by (hpZ)
    sparse.py        an all-reduce of what is not zero        sparse_tensor.py   rows of a matrix, for scripts
    coalesced.py  backend.py      the original's coalesced collectives and compressed backends
    quantized_exchanges.py   gathers in int8 and reductions in int4 (qwZ, qgZ)        relay.py   gathers in two hops
    code.py  feedback.py     their messages; what those left out (LoCo)
    onebit.py        an all-reduce in one bit per element, with error feedback
    choose.py        which of them a group is given        trial.py   which is faster here
    observe.py       how a verb that is watched is waited for
    spread.py        one rank's values of any tensor, given to all
    bench.py         how fast collectives are (`ds_bench`)

Names that are torch.distributed's and not listed here are torch.distributed's own.
"""

# ruff: noqa: F401 - every import here is a public name of this module

from typing import Any

import torch.distributed as _dist
from torch.distributed import P2POp, ProcessGroup, ReduceOp

from deepspeed.comm.collectives import (
    all_gather,
    all_gather_coalesced,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_reduce_coalesced,
    all_to_all,
    all_to_all_single,
    allgather_fn,
    barrier,
    batch_isend_irecv,
    broadcast,
    broadcast_object_list,
    gather,
    inference_all_reduce,
    irecv,
    isend,
    monitored_barrier,
    recv,
    reduce,
    reduce_scatter,
    reduce_scatter_fn,
    reduce_scatter_tensor,
    scatter,
    send,
)
from deepspeed.comm.init import (
    destroy_process_group,
    get_all_ranks_from_group,
    get_global_rank,
    get_local_rank,
    get_rank,
    get_world_group,
    get_world_size,
    has_all_gather_into_tensor,
    has_all_reduce_coalesced,
    has_coalescing_manager,
    has_reduce_scatter_tensor,
    init_distributed,
    initialize_mesh_device,
    is_available,
    is_initialized,
    mpi_discovery,
    new_group,
)
from deepspeed.comm.log import (
    configure,
    get_comm_operation_count,
    get_logged_comm_ops,
    has_comm_data,
    log_summary,
    reset_log,
)
from deepspeed.utils.lazy import lazy_exports as _lazy_exports

_later, _ = _lazy_exports(
    __name__,
    {
        "comm": "deepspeed.comm.comm:",
        "TorchBackend": "deepspeed.comm.torch",
        "comms_logger": "~internal",
        "icdf": "~gone: For a normal distribution's inverse use torch.distributions.Normal(0.0, 1.0).icdf.",
    },
)
_LATER = ("comm", "TorchBackend", "comms_logger", "icdf")
"""Names of the original's inside that scripts import."""


def __getattr__(name: str) -> Any:
    if name == "cdb":  # the original's backend object, None before it is started
        return _dist if is_initialized() else None
    if name in _LATER:
        return _later(name)
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_dist, name)

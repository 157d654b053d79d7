"""Bringing torch.distributed up, and asking it about ranks and groups.

`init_distributed` is called by `initialize`, by `zero.Init` and by users and libraries first. What the launcher said is
read by `utils.launch_env`; this module writes it back to the environment, where user scripts look, and starts the process
group. Invariant: a process group somebody else started is adopted as it is, and never started twice.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# Its default arguments are the group that is there at its import, which torch.compile makes. A group held so outlives
# destroy_process_group, and gloo's threads abort a process that ends while they let go of its last message.
import torch.distributed.nn.functional  # noqa: F401
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import interrupts, log, watchdog
from deepspeed.comm.choose import give_back_ended, timeout_of
from deepspeed.utils.errors import TrainingStateError
from deepspeed.utils.launch_env import DEFAULT_PORT, LaunchEnv, discover, int_or_error
from deepspeed.utils.logging import log_dist, warn_once

DEFAULT_TIMEOUT_MINUTES = 10


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
    **kwargs: Any,
) -> None:
    """Start torch.distributed from what the launcher set, or adopt it where it is started already.

    Works under `deepspeed`, torchrun, MPI, Slurm and with no launcher at all (one process, a free port); mpi4py is
    never needed. Afterwards RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set.

    dist_backend: torch.distributed's backend; None means the accelerator's (nccl, gloo, ...).
    auto_mpi_discovery: also read the variables of MPI, Slurm, AzureML and SageMaker, not only torch's.
    distributed_port: where ranks meet if MASTER_PORT is not set.
    timeout: of collectives; None means DEEPSPEED_TIMEOUT minutes, or 10.
    init_method, rank, world_size: as torch.distributed.init_process_group takes them; they win over the environment.
    dist_init_required: False says that the caller has started it; True or None that it may not have.
    config: an object with a `comms_logger` section, which is applied.

    Other keywords go to init_process_group if it knows them, else one warning names them. Every rank must call this.
    Raises TrainingStateError if `dist_init_required` is False and nothing is started, DeepSpeedError for variables
    that are half set.
    """
    if config is not None:
        log.configure(config)
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise TrainingStateError(
            "dist_init_required=False, but torch.distributed is not initialized.\n"
            "  Call torch.distributed.init_process_group first, or leave dist_init_required out."
        )
    env = None
    if init_method is None or rank < 0 or world_size < 1:
        env = _launch_env(rank, world_size, distributed_port, auto_mpi_discovery)
        env.apply(os.environ)
        rank, world_size = env.rank, env.world_size
        if verbose:
            log_dist(f"joining {env.world_size} ranks at {env.master_addr}:{env.master_port} ({env.source})", [0])
    backend = dist_backend or get_accelerator().communication_backend_name()
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timeout or default_timeout(),
        **_known_to_torch(kwargs),
    )
    if env is not None and init_method is None:
        _stand_by(env, rank, world_size, timeout or default_timeout())


def _stand_by(env: LaunchEnv, rank: int, world_size: int, timeout: timedelta) -> None:
    """Watch over the job from here on: collectives that wait, and Ctrl-C."""
    open_store = None
    if world_size > 1:
        watchdog.watch(env.master_addr, env.master_port, rank, world_size, timeout.total_seconds())
        open_store = watchdog.opens_store(env.master_addr, env.master_port, "deepspeed_interrupts")
    interrupts.heed(open_store, rank, world_size)


def _launch_env(rank: int, world_size: int, port: int, other_launchers: bool) -> LaunchEnv:
    """The environment's word, with the arguments in place of what they override."""
    environ = dict(os.environ)
    if rank >= 0:
        environ["RANK"] = str(rank)
        environ.setdefault("LOCAL_RANK", str(rank))
    if world_size >= 1:
        environ["WORLD_SIZE"] = str(world_size)
    return discover(environ, default_port=port, other_launchers=other_launchers)


def _known_to_torch(kwargs: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(dist.init_process_group).parameters
    for name in kwargs.keys() - known:
        warn_once(f"init_distributed: argument {name!r} has no effect.")
    return {name: value for name, value in kwargs.items() if name in known}


def default_timeout() -> timedelta:
    """DEEPSPEED_TIMEOUT in minutes, or 10."""
    return timedelta(minutes=int_or_error(os.environ, "DEEPSPEED_TIMEOUT", DEFAULT_TIMEOUT_MINUTES))


def mpi_discovery(distributed_port: int = DEFAULT_PORT, verbose: bool = True) -> None:
    """Write the five variables from what MPI, Slurm or another launcher set. Needs no mpi4py."""
    env = discover(os.environ, default_port=distributed_port)
    env.apply(os.environ)
    if verbose:
        log_dist(f"rank {env.rank} of {env.world_size} at {env.master_addr}:{env.master_port} ({env.source})", [0])


def is_available() -> bool:
    """Whether torch was built with distributed support."""
    return dist.is_available()


def is_initialized() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def destroy_process_group(group: ProcessGroup | None = None) -> None:
    """End a group, or all of them."""
    if group is None or group is dist.group.WORLD:
        interrupts.disregard()
        watchdog.unwatch()
    dist.destroy_process_group(group)
    give_back_ended()


def new_group(ranks: Sequence[int] | None = None, **kwargs: Any) -> ProcessGroup:
    """A group of these global ranks, which waits as long as the job's unless a `timeout` is given. Every rank of the world must
    call it, in the same order."""
    kwargs.setdefault("timeout", timeout_of())
    group: ProcessGroup = dist.new_group(list(ranks) if ranks is not None else None, **kwargs)
    return group


def get_rank(group: ProcessGroup | None = None) -> int:
    """This process's rank in the group."""
    return dist.get_rank(group)


def get_world_size(group: ProcessGroup | None = None) -> int:
    """How many ranks the group has."""
    return dist.get_world_size(group)


def get_local_rank() -> int:
    """This process's rank on its node, as LOCAL_RANK says; 0 where nothing says."""
    return int_or_error(os.environ, "LOCAL_RANK", 0)


def get_global_rank(group: ProcessGroup | None = None, group_rank: int = 0) -> int:
    """The global rank of a group's rank."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_world_group() -> ProcessGroup:
    """The group of all ranks."""
    if dist.group.WORLD is None:
        raise TrainingStateError("torch.distributed is not initialized. Call deepspeed.init_distributed() first.")
    return dist.group.WORLD


def get_all_ranks_from_group(group: ProcessGroup | None = None) -> list[int]:
    """The global ranks of a group, in its order."""
    return dist.get_process_group_ranks(group or get_world_group())


def initialize_mesh_device(mesh_shape: Sequence[int], mesh_dim_names: Sequence[str]) -> DeviceMesh:
    """A DeviceMesh over all ranks on the accelerator's devices."""
    device_type = get_accelerator().device_name()
    return init_device_mesh(device_type, tuple(mesh_shape), mesh_dim_names=tuple(mesh_dim_names))


def has_all_gather_into_tensor() -> bool:
    """Whether one tensor may be gathered into one: yes in every torch this runs on."""
    return True


def has_reduce_scatter_tensor() -> bool:
    """Whether one tensor may be scattered into one: yes in every torch this runs on."""
    return True


def has_all_reduce_coalesced() -> bool:
    """Whether torch starts several all-reduces together: yes in every torch this runs on."""
    return True


def has_coalescing_manager() -> bool:
    """Whether several collectives may be started as one: yes in every torch this runs on."""
    return True

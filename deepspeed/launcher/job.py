"""What to run and where, and from it every worker of one node: command and environment. Pure.

A `Job` is made by the `deepspeed` command or by `python -m deepspeed.launcher.launch` from their arguments; one node's
part of it is run by `launch.run_here`. Ranks are numbered through the hosts in order:

    {"a": [0, 1], "b": [4, 5, 6]}   ->   a: ranks 0 1     b: ranks 2 3 4 (local ranks 0 1 2)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from deepspeed.launcher.binding import numactl_command, slice_of
from deepspeed.launcher.hostfile import World


@dataclass(frozen=True, kw_only=True, slots=True)
class Elastic:
    """Between how many nodes a job may run."""

    min_nodes: int
    max_nodes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One run of a script on all slots of a world."""

    world: World
    master_addr: str
    master_port: int
    script: str
    script_args: Sequence[str] = ()
    node_rank: int = 0
    module: bool = False
    """The script is a module name."""
    no_python: bool = False
    """The script is executed itself."""
    no_local_rank: bool = False
    """Do not add --local_rank=N to the script's arguments."""
    visible_devices: str | None = "CUDA_VISIBLE_DEVICES"
    """The variable that says which devices a worker sees; None sets none."""
    log_dir: Path | None = None
    """Where each rank's output goes instead of the terminal."""
    bind_cores: Sequence[int] | None = None
    """Cores to share out among the ranks with numactl; None binds none."""
    threads_per_rank: int | None = None
    """OMP_NUM_THREADS where the caller has not set it; None sets none."""
    elastic: Elastic | None = None
    """The number of nodes may change; None: it is fixed."""

    @property
    def host(self) -> str:
        """This node's name in the world."""
        return list(self.world)[self.node_rank]

    @property
    def local_size(self) -> int:
        """How many ranks this node runs."""
        return len(self.world[self.host])

    @property
    def world_size(self) -> int:
        """How many ranks all nodes run."""
        return sum(map(len, self.world.values()))

    @property
    def first_rank(self) -> int:
        """The rank of this node's first worker."""
        return sum(len(slots) for slots in list(self.world.values())[: self.node_rank])


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One rank: what to execute, in which environment, and where its output goes (None: the terminal)."""

    rank: int
    command: Sequence[str]
    environ: Mapping[str, str]
    log: Path | None = None
    label: str = ""
    """Its name in messages, if it is not a rank."""

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.label or f"rank {self.rank}"


def workers(
    job: Job,
    environ: Mapping[str, str],
    *,
    numa: Mapping[int, Sequence[int]] | None = None,
    now: datetime | None = None,
) -> list[Worker]:
    """This node's workers. `environ` is the caller's; `numa` {node: cores} is needed for binding only."""
    if job.elastic is not None:
        return [_elastic_worker(job, job.elastic, environ)]
    made = []
    for local_rank in range(job.local_size):
        rank = job.first_rank + local_rank
        made.append(
            Worker(
                rank=rank,
                command=_command(job, local_rank, numa or {}),
                environ={**environ, **_variables(job, local_rank, environ)},
                log=log_path(job.log_dir, rank, now) if job.log_dir else None,
            )
        )
    return made


def _elastic_worker(job: Job, elastic: Elastic, environ: Mapping[str, str]) -> Worker:
    """torchrun's agent, which starts this node's ranks and starts them again when nodes come and go."""
    agent = [
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.elastic",
        f"--nodes={elastic.min_nodes}:{elastic.max_nodes}",
    ]
    flags = [f"--ranks={job.local_size}", f"--meet={job.master_addr}:{job.master_port}"]
    log = [f"--log_dir={job.log_dir}"] if job.log_dir else []
    names = {job.visible_devices: ",".join(map(str, job.world[job.host]))} if job.visible_devices else {}
    if job.threads_per_rank is not None and "OMP_NUM_THREADS" not in environ:
        names["OMP_NUM_THREADS"] = str(job.threads_per_rank)
    rest = [
        *log,
        *([] if job.no_local_rank else [f"--local_rank_at={len(_python(job))}"]),
        "--",
        *_python(job),
        *job.script_args,
    ]
    return Worker(
        rank=job.node_rank, command=[*agent, *flags, *rest], environ={**environ, **names}, label=f"node {job.host}"
    )


def _python(job: Job) -> list[str]:
    """What runs the script, up to the script's own arguments."""
    return [*([] if job.no_python else [sys.executable, "-u", *(["-m"] if job.module else [])]), job.script]


def log_path(folder: Path, rank: int, now: datetime | None = None) -> Path:
    """The file for a rank's output."""
    return folder / f"{(now or datetime.now()):%Y%m%d%H%M%S}_rank{rank}.log"


def _variables(job: Job, local_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables a worker gets on top of the caller's."""
    variables: dict[str, object] = {
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": job.master_port,
        "WORLD_SIZE": job.world_size,
        "RANK": job.first_rank + local_rank,
        "LOCAL_RANK": local_rank,
        "LOCAL_SIZE": job.local_size,
        "LOCAL_WORLD_SIZE": job.local_size,
        "CROSS_RANK": job.node_rank,
        "CROSS_SIZE": len(job.world),
    }
    if job.visible_devices:
        variables[job.visible_devices] = ",".join(map(str, job.world[job.host]))
    if job.bind_cores is not None:
        variables["OMP_NUM_THREADS"] = len(slice_of(job.bind_cores, local_rank, job.local_size))
    elif job.threads_per_rank is not None and "OMP_NUM_THREADS" not in environ:
        variables["OMP_NUM_THREADS"] = job.threads_per_rank
    return {name: str(value) for name, value in variables.items()}


def _command(job: Job, local_rank: int, numa: Mapping[int, Sequence[int]]) -> list[str]:
    binding: list[str] = []
    if job.bind_cores is not None:
        binding = numactl_command(slice_of(job.bind_cores, local_rank, job.local_size), numa)
    own = [] if job.no_local_rank else [f"--local_rank={local_rank}"]
    return [*binding, *_python(job), *own, *job.script_args]

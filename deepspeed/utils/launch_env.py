"""What the program that started this process said about rank, world size and meeting point: a table over variables.

`comm.init_distributed` and `launcher.launcher_helper` call `discover`; nothing else in the package reads these variables from the
environment. `discover` is pure: a mapping goes in, a `LaunchEnv` comes out, the first row that applies decides:

    torch variables (torchrun, deepspeed, Accelerate, Lightning)  >  AzureML  >  SageMaker  >  Open MPI  >  MVAPICH
    >  MPICH and Intel MPI (PMI, PMIx, PALS)  >  Slurm steps  >  one process alone

Invariant: no import of mpi4py, no name resolution, no communication. A set of variables that is only half there is an
error that names what is missing, never a guess.

Sources: the documentation of torchrun, Open MPI (mpirun, "Environmental variables"), MVAPICH2, MPICH Hydra, Cray PALS,
Slurm's srun and scontrol (host lists), AzureML's and SageMaker's distributed jobs.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.ports import free_port, is_free

LOCALHOST = "127.0.0.1"
DEFAULT_PORT = 29500
GRACE_VARIABLE = "DS_GRACE_S"
"""Our launcher tells ranks in it how many seconds after SIGINT it sends SIGTERM."""
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchEnv:
    """One process's place in the job. `source` says which program's variables it was read from."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    source: str

    def __post_init__(self) -> None:
        places = (("rank", self.rank, self.world_size), ("local rank", self.local_rank, self.local_size))
        for what, position, count in places:
            if not 0 <= position < count:
                raise DeepSpeedError(
                    f"{what} {position} is not in a world of {count} (from the variables of {self.source}).\n"
                    "  Both come from the launcher; unset them to run one process, or start with the launcher."
                )

    def apply(self, environ: MutableMapping[str, str]) -> None:
        """Write the variables torch and user scripts read."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """One row: the variables of a launcher. Of several names for a number, the first that is set counts."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()


_OPEN_MPI = _Source(
    name="Open MPI",
    rank=("OMPI_COMM_WORLD_RANK",),
    world_size=("OMPI_COMM_WORLD_SIZE",),
    local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
    local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_MVAPICH = _Source(
    name="MVAPICH",
    rank=("MV2_COMM_WORLD_RANK",),
    world_size=("MV2_COMM_WORLD_SIZE",),
    local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
    local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
)
_PMI = _Source(
    name="MPICH or Intel MPI",
    rank=("PMI_RANK", "PMIX_RANK"),
    world_size=("PMI_SIZE", "PALS_SIZE", "PMIX_SIZE", "WORLD_SIZE"),
    local_rank=("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
    local_size=("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
)
_SLURM = _Source(
    name="Slurm",
    rank=("SLURM_PROCID",),
    world_size=("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
    local_rank=("SLURM_LOCALID",),
)
_TORCH = _Source(
    name="torchrun",
    rank=("RANK",),
    world_size=("WORLD_SIZE",),
    local_rank=("LOCAL_RANK",),
    local_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
)
_MPI_SOURCES = (_OPEN_MPI, _MVAPICH, _PMI)


def discover(
    environ: Mapping[str, str], *, default_port: int = DEFAULT_PORT, other_launchers: bool = True
) -> LaunchEnv:
    """This process's place in the job, from the variables of whatever started it; alone if nothing did.

    `other_launchers=False` reads torch's variables only. Raises DeepSpeedError for variables that are half set or are
    not numbers.
    """
    if "RANK" in environ:
        return _from_torch(environ, default_port)
    if other_launchers:
        if "AZUREML_EXPERIMENT_ID" in environ and "DLTS_JOB_ID" not in environ and _is_set(environ, _OPEN_MPI.rank):
            return _from_azureml(environ, default_port)
        if "SM_TRAINING_ENV" in environ and _is_set(environ, _OPEN_MPI.rank):
            return _from_sagemaker(environ, default_port)
        for source in _MPI_SOURCES:
            if _is_set(environ, source.rank):
                return _from_mpi(environ, source, default_port)
        if _is_set(environ, _SLURM.rank) and "SLURM_STEP_ID" in environ:
            return _from_slurm(environ, default_port)
    if int_or_error(environ, "WORLD_SIZE", 1) > 1 or _agent_keeps_store(environ):
        _missing(environ, "torchrun", ["RANK"])
    return _alone(environ)


def _alone(environ: Mapping[str, str]) -> LaunchEnv:
    local_rank = int_or_error(environ, "LOCAL_RANK", 0)
    return LaunchEnv(
        rank=0,
        world_size=1,
        local_rank=local_rank,
        local_size=local_rank + 1,
        master_addr=environ.get("MASTER_ADDR") or LOCALHOST,
        master_port=_port_alone(environ),
        source="one process, no launcher",
    )


def _from_torch(environ: Mapping[str, str], default_port: int) -> LaunchEnv:
    env = _read(environ, _TORCH)
    if env.world_size > 1 or _agent_keeps_store(environ):
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
        if missing:
            _missing(environ, _TORCH.name, missing)
    return _meet(env, environ, LOCALHOST, default_port)


def _from_mpi(environ: Mapping[str, str], source: _Source, default_port: int) -> LaunchEnv:
    env = _read(environ, source)
    if not environ.get("MASTER_ADDR") and env.world_size > 1 and not _is_one_node(environ, source, env):
        raise DeepSpeedError(
            f"MASTER_ADDR is not set, and {source.name}'s {env.world_size} processes may be on several nodes "
            f"({env.local_size} on this one).\n"
            "  Set MASTER_ADDR to the first node's address for all of them (mpirun -x MASTER_ADDR=... or -genv)."
        )
    return _meet(env, environ, LOCALHOST, default_port)


def _from_azureml(environ: Mapping[str, str], default_port: int) -> LaunchEnv:
    env = replace(_read(environ, _OPEN_MPI), source="AzureML")
    if env.local_size == env.world_size:
        address = ""
    else:
        address = environ.get("AZ_BATCH_MASTER_NODE") or environ.get("AZ_BATCHAI_MPI_MASTER_NODE", "")
        if not address and not environ.get("MASTER_ADDR"):
            _missing(environ, "AzureML", ["AZ_BATCH_MASTER_NODE"])
    host, _, port = address.partition(":")
    return _meet(env, environ, host or LOCALHOST, int(port) if port.isdecimal() else default_port)


def _from_sagemaker(environ: Mapping[str, str], default_port: int) -> LaunchEnv:
    env = replace(_read(environ, _OPEN_MPI), source="SageMaker")
    try:
        hosts = json.loads(environ["SM_TRAINING_ENV"]).get("hosts") or [LOCALHOST]
    except (json.JSONDecodeError, AttributeError):
        raise DeepSpeedError("SM_TRAINING_ENV is not a JSON object. SageMaker sets it; leave it as it is.") from None
    return _meet(env, environ, str(hosts[0]), default_port)


def _from_slurm(environ: Mapping[str, str], default_port: int) -> LaunchEnv:
    env = _read(environ, _SLURM)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    node = int_or_error(environ, "SLURM_NODEID", 0)
    counts = list(_expand_counts(tasks))
    if node < len(counts):
        env = replace(env, local_size=counts[node])
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not hosts and env.world_size > 1:
        _missing(environ, "Slurm", ["SLURM_STEP_NODELIST"])
    # Two steps of one user on one node must not meet: the port is derived from the job, as every task knows it.
    job = int_or_error(environ, "SLURM_JOB_ID", 0)
    port = default_port if default_port != DEFAULT_PORT or not job else 20000 + job % 10000
    return _meet(env, environ, next(expand_hosts(hosts)) if hosts else LOCALHOST, port)


def _meet(env: LaunchEnv, environ: Mapping[str, str], address: str, port: int) -> LaunchEnv:
    """`env` with the meeting point: MASTER_ADDR and MASTER_PORT where they are set, else those given."""
    is_alone = env.world_size == 1
    return replace(
        env,
        master_addr=environ.get("MASTER_ADDR") or address,
        master_port=_port_alone(environ) if is_alone else int_or_error(environ, "MASTER_PORT", 0) or port,
    )


def _port_alone(environ: Mapping[str, str]) -> int:
    """MASTER_PORT where an agent keeps the store there, or where it can be had; else any: nobody else has to find it."""
    asked = int_or_error(environ, "MASTER_PORT", 0)
    return asked if asked and (_agent_keeps_store(environ) or is_free(asked)) else free_port()


def _agent_keeps_store(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent listens at the meeting point, so that every rank, 0 too, is to connect there as a client.
    torch compares with this one spelling (torch.distributed.rendezvous)."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _read(environ: Mapping[str, str], source: _Source) -> LaunchEnv:
    missing = [names[0] for names in (source.rank, source.world_size) if not _is_set(environ, names)]
    if missing:
        _missing(environ, source.name, missing)
    rank, world_size = _first(environ, source.rank), _first(environ, source.world_size)
    is_alone = world_size == 1
    if not (is_alone or _is_set(environ, source.local_rank)):
        _missing(environ, source.name, [source.local_rank[0]])
    local_rank = _first(environ, source.local_rank, 0)
    return LaunchEnv(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_size=_first(environ, source.local_size, max(world_size, local_rank + 1)),
        master_addr=LOCALHOST,
        master_port=0,
        source=source.name,
    )


def _is_one_node(environ: Mapping[str, str], source: _Source, env: LaunchEnv) -> bool:
    return _is_set(environ, source.local_size) and env.local_size == env.world_size


def _is_set(environ: Mapping[str, str], names: tuple[str, ...]) -> bool:
    return any(environ.get(name) for name in names)


def _first(environ: Mapping[str, str], names: tuple[str, ...], default: int = 0) -> int:
    return next((int_or_error(environ, name, default) for name in names if environ.get(name)), default)


def int_or_error(environ: Mapping[str, str], name: str, default: int) -> int:
    """A variable as a number; `default` where it is unset or empty. Raises DeepSpeedError where it is no number."""
    value = environ.get(name)
    try:
        return int(value) if value else default
    except ValueError:
        raise DeepSpeedError(f"{name}={value!r} is not a whole number. Unset it, or let the launcher set it.") from None


def _missing(environ: Mapping[str, str], source: str, names: list[str]) -> None:
    known = [name for name in (*TORCH_VARIABLES, "SLURM_PROCID") if environ.get(name)]
    raise DeepSpeedError(
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not set, although other variables of {source} are "
        f"({', '.join(f'{name}={environ[name]}' for name in known) or 'rank'}).\n"
        "  Set all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, start with `deepspeed` or torchrun, "
        "or unset them all to run one process."
    )


def expand_hosts(hosts: str) -> Iterator[str]:
    """The hosts of a Slurm list in order: "n[01-03,7],login" -> n01 n02 n03 n7 login."""
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        literals = re.split(r"\[[^\]]*\]", item)
        choices = [list(_expand_range(inside)) for inside in re.findall(r"\[([^\]]*)\]", item)]
        for chosen in itertools.product(*choices):
            yield "".join(itertools.chain.from_iterable(itertools.zip_longest(literals, chosen, fillvalue="")))


def _expand_range(inside: str) -> Iterator[str]:
    """ "01-03,7" -> 01 02 03 7; the width of the first number is kept."""
    for part in inside.split(","):
        first, _, last = part.partition("-")
        yield from (str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1))


def _expand_counts(tasks: str) -> Iterator[int]:
    """Slurm's tasks per node: "4(x2),3" -> 4 4 3."""
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        yield from itertools.repeat(int(count), int(repeat or 1))

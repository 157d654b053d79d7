"""One rank's part where an MPI or Slurm starts every rank: `python -m deepspeed.launcher.launcher_helper ... script args`.

The starting program says in its own variables which rank this is (`utils.launch_env`); the helper says it in torch's,
and supervises the script like a node's launcher does its workers: the failing rank's last words reach the user, and the
rank ends with the job even where mpirun or srun are gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deepspeed.launcher import binding
from deepspeed.launcher.agent import CONNECT_S, Membership, take_part
from deepspeed.launcher.control import TOKEN_VARIABLE, Link
from deepspeed.launcher.hostfile import World
from deepspeed.launcher.job import Job, Worker, log_path
from deepspeed.launcher.launch import (
    add_job_arguments,
    add_member_arguments,
    cores_to_bind,
    make_folder,
    set_up_logging,
)
from deepspeed.launcher.outlet import open_standard_streams
from deepspeed.launcher.supervise import Supervisor
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.launch_env import LOCALHOST, TORCH_VARIABLES, LaunchEnv, discover

MPI_DAEMONS = ("orted", "prted", "hydra_pmi_proxy")
DAEMON_GRACE_S = 2.0


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.launcher.launcher_helper", description="Run one rank.", allow_abbrev=False
    )
    parser.add_argument("--launcher", required=True, help="what started this process")
    parser.add_argument("--hosts", default="", help="the job's hosts, comma-separated")
    parser.add_argument("--master_addr", default="", help="rank 0's host; by default rank 0 says")
    parser.add_argument("--master_port", type=int, default=0, help="rank 0's port; by default rank 0 says")
    add_member_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument("training_script")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    return parser.parse_args(args)


def place(environ: Mapping[str, str], launcher: str) -> LaunchEnv:
    """Which rank this is. What torch's variables say is older than what the starting program says, and ignored."""
    known = {name: value for name, value in environ.items() if name not in TORCH_VARIABLES}
    env = discover({**known, "MASTER_ADDR": LOCALHOST})
    if env.source == "one process, no launcher":
        raise DeepSpeedError(
            f"--launcher {launcher}, but no rank is set by it (such as OMPI_COMM_WORLD_RANK, PMI_RANK or "
            f"SLURM_PROCID).\n  Start with `deepspeed --launcher {launcher}`, and check that its mpirun or srun runs."
        )
    return env


def worker_of(job: Job, env: LaunchEnv, environ: Mapping[str, str], numa: Mapping[int, Sequence[int]]) -> Worker:
    """The rank's script, with torch's variables."""
    made = dict(environ)
    made.pop(TOKEN_VARIABLE, None)
    env.apply(made)
    made |= {
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(job.master_port),
        "LOCAL_SIZE": str(env.local_size),
        "LOCAL_WORLD_SIZE": str(env.local_size),
    }
    command = [] if job.no_python else [sys.executable, "-u", *(["-m"] if job.module else [])]
    if job.bind_cores is not None:
        cores = binding.slice_of(job.bind_cores, env.local_rank, env.local_size)
        command = [*binding.numactl_command(cores, numa), *command]
        made["OMP_NUM_THREADS"] = str(len(cores))
    elif "OMP_NUM_THREADS" not in environ and env.local_size > 1:
        made["OMP_NUM_THREADS"] = str(max(1, len(binding.allowed_cores()) // env.local_size))
    return Worker(
        rank=env.rank,
        command=[*command, job.script, *job.script_args],
        environ=made,
        log=log_path(job.log_dir, env.rank) if job.log_dir else None,
    )


def end_daemon(pid: int) -> None:
    """End the MPI's daemon that started this rank, once its mpirun is out of reach.

    It would wait for TCP to give up sending to it, a quarter of an hour; and it serves this one job.
    """
    comm = Path(f"/proc/{pid}/comm")
    if comm.exists() and comm.read_text().strip() in MPI_DAEMONS:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):
                os.kill(pid, number)
            until_s = time.monotonic() + DAEMON_GRACE_S
            while os.getppid() == pid and time.monotonic() < until_s:
                time.sleep(0.05)


def run(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run this rank to its end; the exit code."""
    env = place(environ, args.launcher)
    world: World = {host: [] for host in args.hosts.split(",") if host}

    def make_job() -> Job:
        log_dir = None if args.enable_each_rank_log == "None" else Path(args.enable_each_rank_log)
        if log_dir is not None:
            make_folder(log_dir)
        return Job(
            world=world,
            master_addr=args.master_addr,
            master_port=args.master_port,
            script=args.training_script,
            script_args=args.training_script_args,
            module=args.module,
            no_python=args.no_python,
            log_dir=log_dir,
            bind_cores=cores_to_bind(args) if args.bind_cores_to_rank else None,
        )

    def supervise(job: Job, link: Link | None) -> int:
        numa = binding.numa_nodes() if job.bind_cores is not None else {}
        name = f"rank {env.rank}"
        supervisor = Supervisor([worker_of(job, env, environ, numa)], grace_s=args.grace_period, link=link, name=name)
        code = supervisor.run()
        if supervisor.has_lost_link:
            end_daemon(os.getppid())
        return code

    if not args.control:
        if not (args.master_addr and args.master_port):
            raise DeepSpeedError(
                "--no_control needs --master_addr and --master_port.\n  Give rank 0's host, and a port."
            )
        return supervise(make_job(), None)
    membership = Membership(
        address=args.control,
        token=environ.get(TOKEN_VARIABLE, ""),
        index=env.rank,
        name=f"rank {env.rank}",
        connect_s=CONNECT_S,
    )
    return take_part(membership, make_job, supervise)


def main(args: Sequence[str] | None = None) -> int:
    """Called by mpirun and srun; the exit code."""
    open_standard_streams()
    parsed = _parse(args)
    set_up_logging(parsed)
    try:
        return run(parsed, os.environ)
    except DeepSpeedError as error:
        print(f"deepspeed: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

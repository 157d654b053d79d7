"""One node's part of a job: `python -m deepspeed.launcher.launch --world_info=... script args`.

Remote starters (pdsh, ssh, a user's own scripts) run this on every node; on one node the `deepspeed` command uses
`run_here` itself, without a process in between. With --control the node is a member of a job that a coordinator holds
together (`agent`); without, it stands alone. The arguments are those of the original launcher, because cluster
scripts spell them out.

Invariant: exits with the first failing worker's code, 256 - s if signal s killed it, and 1 after SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepspeed.accelerator.platforms import Platform, known_without_torch
from deepspeed.launcher import binding
from deepspeed.launcher.agent import CONNECT_S, DEFAULT_PORT, Membership, take_part
from deepspeed.launcher.control import TOKEN_VARIABLE, Link
from deepspeed.launcher.hostfile import decode_world
from deepspeed.launcher.job import Elastic, Job, workers
from deepspeed.launcher.outlet import open_standard_streams
from deepspeed.launcher.supervise import GRACE_S, Supervisor
from deepspeed.launcher.variables import shown
from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.launch_env import GRACE_VARIABLE

logger = logging.getLogger("DeepSpeed.launcher")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


def run_here(job: Job, *, link: Link | None = None, grace_s: float = GRACE_S, tells: bool = False) -> int:
    """Start this node's workers and wait for them; the exit code. With a link, as a member of a job on several nodes."""
    if job.log_dir is not None:
        make_folder(job.log_dir)
    numa = binding.numa_nodes() if job.bind_cores is not None else {}
    logger.info(
        "%d of %d ranks on this node, meeting at %s:%d",
        job.local_size,
        job.world_size,
        job.master_addr,
        job.master_port,
    )
    for name in sorted(name for name in os.environ if name.startswith("NCCL")):
        logger.info("%s", shown(name, os.environ[name]))
    environ = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    environ[GRACE_VARIABLE] = f"{grace_s:g}"
    started = workers(job, environ, numa=numa)
    for worker in started:
        logger.debug("%s: %s", worker.name, worker.command)
    return Supervisor(started, grace_s=grace_s, link=link, name=f"node {job.host}", tells=tells).run()


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that mean the same to the `deepspeed` command and to a node's launcher."""
    parser.add_argument("--module", action="store_true", help="the script is a module, as in python -m")
    parser.add_argument("--no_python", action="store_true", help="execute the script itself, without python")
    parser.add_argument(
        "--no_local_rank", action="store_true", help="do not add --local_rank=N to the script's arguments"
    )
    parser.add_argument(
        "--enable_each_rank_log",
        metavar="DIR",
        default="None",
        help="write each rank's output to DIR/<time>_rank<R>.log instead of the terminal",
    )
    parser.add_argument(
        "--bind_cores_to_rank", action="store_true", help="share the physical cores out among the ranks, with numactl"
    )
    parser.add_argument("--bind_core_list", metavar="CORES", help="the cores to share out, such as 1,3-5,7")
    parser.add_argument(
        "--grace_period",
        type=float,
        default=GRACE_S,
        metavar="S",
        help="seconds from SIGTERM to SIGKILL, and after Ctrl-C from SIGINT to SIGTERM (%(default)g)",
    )
    parser.add_argument("--log_level", choices=LOG_LEVELS, default="info", help="of the launcher itself")
    parser.add_argument("-q", "--quiet", action="store_true", help="the same as --log_level error")


def add_member_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of whoever takes part in a job on several nodes; the `deepspeed` command writes them."""
    parser.add_argument("--control", default="", metavar="HOST:PORT", help="where the job's coordinator listens")


def add_elastic_arguments(parser: argparse.ArgumentParser, flag: str) -> None:
    """Elastic training, under the name that the command or a node's launcher has for it."""
    elastic = parser.add_argument_group("elastic training")
    elastic.add_argument(flag, dest="elastic_training", action="store_true", help="let the number of nodes change")
    elastic.add_argument("--min_elastic_nodes", type=int, default=-1, help="at least so many; by default 1")
    elastic.add_argument("--max_elastic_nodes", type=int, default=-1, help="at most so many; by default all")


def elastic_of(args: argparse.Namespace, num_nodes: int) -> Elastic | None:
    """The limits that the flags give; None without elastic training. Raises DeepSpeedError where they make no sense."""
    if not args.elastic_training:
        return None
    least = args.min_elastic_nodes if args.min_elastic_nodes > 0 else 1
    most = args.max_elastic_nodes if args.max_elastic_nodes > 0 else max(num_nodes, least)
    if least > most:
        raise DeepSpeedError(f"--min_elastic_nodes {least} is more than --max_elastic_nodes {most}.\n  Exchange them.")
    return Elastic(min_nodes=least, max_nodes=most)


def job_options(args: argparse.Namespace, platform: Platform | None, local_size: int) -> dict[str, object]:
    """The fields of a Job that come from `add_job_arguments` and from the kind of machine. Checks them."""
    if args.module and args.no_python:
        raise DeepSpeedError("--module and --no_python exclude each other.\n  A module is run by python; give one.")
    if args.bind_core_list and not args.bind_cores_to_rank:
        logger.warning("--bind_core_list has no effect without --bind_cores_to_rank")
    is_cpu = platform is not None and platform.name == "cpu"
    visible = platform.visible_devices if platform else "CUDA_VISIBLE_DEVICES"
    # A caller who hides GPUs from a CPU run keeps them hidden.
    keeps_visible = is_cpu and visible in os.environ
    return {
        "module": args.module,
        "no_python": args.no_python,
        "no_local_rank": args.no_local_rank,
        "visible_devices": None if keeps_visible else visible,
        "log_dir": None if args.enable_each_rank_log == "None" else Path(args.enable_each_rank_log),
        "bind_cores": cores_to_bind(args) if args.bind_cores_to_rank else None,
        # Ranks that compute on the CPU would each start a thread per core.
        "threads_per_rank": max(1, len(binding.allowed_cores()) // local_size) if is_cpu and local_size > 1 else None,
    }


def set_up_logging(args: argparse.Namespace) -> None:
    """Write this launcher's messages to stderr, from the level asked for."""
    logger.setLevel("ERROR" if args.quiet else args.log_level.upper())
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [launcher] %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


@contextlib.contextmanager
def pid_file(owner: int | None) -> Iterator[None]:
    """While open, <tmp>/<owner>.deepspeed holds this process's id, for scripts that signal it. None: no file."""
    if owner is None:
        yield
        return
    path = Path(tempfile.gettempdir()) / f"{owner}.deepspeed"
    try:
        with path.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        raise DeepSpeedError(f"--save_pid: {path} exists already.\n  Remove it if that launcher is gone.") from None
    print(f"launcher pid: {os.getpid()}", flush=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def cores_to_bind(args: argparse.Namespace) -> list[int]:
    """The cores of `--bind_core_list`, or all physical ones that this process may use. Raises DeepSpeedError where ranks cannot be
    bound, or not to these."""
    if "KMP_AFFINITY" in os.environ:
        raise DeepSpeedError(
            f"--bind_cores_to_rank with KMP_AFFINITY={os.environ['KMP_AFFINITY']}: both bind threads to cores.\n"
            "  Unset KMP_AFFINITY."
        )
    if shutil.which("numactl") is None:
        raise DeepSpeedError(
            "--bind_cores_to_rank needs numactl, which is not installed.\n  Install it, or drop the flag."
        )
    allowed = binding.allowed_cores()
    cores = binding.parse_cores(args.bind_core_list) if args.bind_core_list else binding.physical_cores(allowed)
    missing = [core for core in cores if core not in allowed]
    if missing:
        raise DeepSpeedError(
            f"--bind_core_list {args.bind_core_list}: {socket.gethostname()} has no core {missing[0]} for this process.\n"
            f"  It may use {','.join(binding.ranges(allowed))}."
        )
    return cores


def make_folder(path: Path) -> None:
    """Have the directory of `--enable_each_rank_log`. Raises DeepSpeedError where it cannot be."""
    if path.exists() and not path.is_dir():
        raise DeepSpeedError(f"--enable_each_rank_log {path} is a file.\n  Name a directory; it is made if missing.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DeepSpeedError(
            f"--enable_each_rank_log {path} cannot be made: {error.strerror}.\n  Name a directory that you may write to."
        ) from None


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed.launcher.launch", description="Start this node's ranks.", allow_abbrev=False
    )
    parser.add_argument("--node_rank", type=int, default=0, help="this node's place in the world, from 0")
    parser.add_argument("--master_addr", default="127.0.0.1", help="rank 0's host")
    parser.add_argument("--master_port", type=int, default=DEFAULT_PORT, help="rank 0's port")
    parser.add_argument("--world_info", default="None", help='{"host": [slot, ...]} as URL-safe base64 of JSON')
    parser.add_argument("--save_pid", type=int, default=0, help="id of the process to name a file with our id after")
    add_elastic_arguments(parser, "--enable_elastic_training")
    add_member_arguments(parser)
    add_job_arguments(parser)
    parser.add_argument("training_script")
    parser.add_argument("training_script_args", nargs=argparse.REMAINDER)
    return parser.parse_args(args)


def _job(args: argparse.Namespace) -> Job:
    if args.world_info == "None":
        raise DeepSpeedError("--world_info is missing.\n  It says which slots each node has; `deepspeed` writes it.")
    world = decode_world(args.world_info)
    if not 0 <= args.node_rank < len(world):
        raise DeepSpeedError(
            f"--node_rank {args.node_rank} is not in [0, {len(world)}): the world has {len(world)} nodes."
        )
    job = Job(
        world=world,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
        script=args.training_script,
        script_args=args.training_script_args,
    )
    options = job_options(args, known_without_torch(os.environ) or _ask_torch(), job.local_size)
    options["elastic"] = elastic_of(args, len(world))
    return dataclasses.replace(job, **options)  # type: ignore[arg-type]


def _ask_torch() -> Platform:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().platform


def main(args: Sequence[str] | None = None) -> int:
    """Run this node's part of a job; the exit code.

    Called as a command, it prints what is wrong with its arguments; called with `args`, it raises DeepSpeedError.
    """
    open_standard_streams()
    parsed = _parse(args)
    set_up_logging(parsed)
    try:
        with pid_file(parsed.save_pid or None):
            return run_node(parsed)
    except DeepSpeedError as error:
        if args is not None:
            raise
        print(f"deepspeed: {error}", file=sys.stderr)
        return 2


def run_node(args: argparse.Namespace) -> int:
    """Run the node's part, on its own or as a member."""
    if not args.control:
        return run_here(_job(args), grace_s=args.grace_period)
    hosts = list(decode_world(args.world_info)) if args.world_info != "None" else []
    membership = Membership(
        address=args.control,
        token=os.environ.get(TOKEN_VARIABLE, ""),
        index=args.node_rank,
        name=f"node {hosts[args.node_rank]}" if 0 <= args.node_rank < len(hosts) else f"node {args.node_rank}",
        connect_s=CONNECT_S,
    )
    return take_part(
        membership, lambda: _job(args), lambda job, link: run_here(job, link=link, grace_s=args.grace_period)
    )


if __name__ == "__main__":
    sys.exit(main())

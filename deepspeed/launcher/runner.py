"""The `deepspeed` command: find the machines and devices, choose a meeting point, start the script on every slot.

Everything after the script's name goes to the script verbatim. What is asked for becomes a `Job`; on one node
`launch.LocalBackend` runs it in this process. Backends for several nodes are to be one class each, chosen by
--launcher; until then asking for several nodes says so (--no_ssh, by hand on every node, works).

Invariant: nothing here imports torch unless devices have to be counted, so that the command answers at once.
Source: the public contract of the original's command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path

from deepspeed.accelerator.platforms import Platform, cpu_device_count, known_without_torch
from deepspeed.launcher import hostfile
from deepspeed.launcher.commands import COMMANDS, run_command
from deepspeed.launcher.hostfile import World
from deepspeed.launcher.job import Job
from deepspeed.launcher.launch import (
    DEFAULT_PORT,
    LocalBackend,
    add_job_arguments,
    job_options,
    logger,
    pid_file,
    set_up_logging,
)
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError
from deepspeed.utils.ports import is_free, reserve_port

DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
"""The file with variables for remote nodes; Accelerate appends to it."""

HOSTFILE = Path("/job/hostfile")
LAUNCHERS = ("pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed",
        description="Start a training script on every device of one or more machines. Flags come before the script; "
        f"everything after it is passed to it. Other commands: {', '.join(f'deepspeed {word}' for word in COMMANDS)}.",
        allow_abbrev=False,
    )
    where = parser.add_argument_group("where to run")
    where.add_argument("-H", "--hostfile", type=Path, default=HOSTFILE, help='lines "<host> slots=<n>" (%(default)s)')
    where.add_argument("-i", "--include", default="", help='slots to use: "host1@host2:0,2"')
    where.add_argument("-e", "--exclude", default="", help="slots not to use, written alike")
    where.add_argument("--num_nodes", type=int, default=-1, help="use the first N hosts")
    where.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1, help="ranks on each host")
    where.add_argument("--node_rank", type=int, default=-1, help="this host's place in the hostfile, with --no_ssh")
    meet = parser.add_argument_group("where ranks meet")
    meet.add_argument(
        "--master_port", type=int, help=f"rank 0's port; by default {DEFAULT_PORT}, or a free one if it is taken"
    )
    meet.add_argument("--master_addr", default="", help="rank 0's host; 127.0.0.1 on one machine")
    multi = parser.add_argument_group("several machines")
    multi.add_argument("--launcher", default="pdsh", help=f"one of {', '.join(LAUNCHERS)}")
    multi.add_argument("--launcher_args", default="", help="more arguments for that launcher, as one string")
    multi.add_argument("--no_ssh", action="store_true", help="start this node's ranks only; run this on every node")
    multi.add_argument("--no_ssh_check", action="store_true", help="do not try whether ssh works first")
    multi.add_argument("--force_multi", action="store_true", help="use the launcher for one host, too")
    multi.add_argument("--ssh_port", type=int, help="ssh's port on the hosts")
    multi.add_argument("--venv_script", type=Path, help="a script to source on the hosts first (pdsh)")
    elastic = parser.add_argument_group("elastic training")
    elastic.add_argument("--elastic_training", action="store_true", help="let the number of nodes change")
    elastic.add_argument("--min_elastic_nodes", type=int, default=-1, help="at least so many")
    elastic.add_argument("--max_elastic_nodes", type=int, default=-1, help="at most so many")
    parser.add_argument("--save_pid", action="store_true", help="write our process id to <tmp>/<id>.deepspeed")
    parser.add_argument("--autotuning", choices=("tune", "run"), default="", help="search for a fast configuration")
    add_job_arguments(parser)
    parser.add_argument("user_script", help="what to start")
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace. Raises DeepSpeedError for flags that contradict each other."""
    parsed = _parser().parse_args(args)
    _check(parsed)
    return parsed


def _check(args: argparse.Namespace) -> None:
    if (args.num_nodes >= 0 or args.num_gpus >= 0) and (args.include or args.exclude):
        raise DeepSpeedError(
            "--num_nodes and --num_gpus do not go with --include and --exclude.\n"
            "  Name the slots with --include alone, or count them with --num_nodes and --num_gpus."
        )
    for flag, count in (("--num_nodes", args.num_nodes), ("--num_gpus", args.num_gpus)):
        if count == 0 or count < -1:
            raise DeepSpeedError(f"{flag} {count} starts nothing.\n  Give a number of at least 1, or leave it out.")
    if args.master_port is not None and not 1 <= args.master_port <= 65535:
        raise DeepSpeedError(f"--master_port {args.master_port} is no TCP port.\n  Give a number from 1 to 65535.")
    if args.node_rank >= 0 and not args.no_ssh:
        raise DeepSpeedError(
            f"--node_rank {args.node_rank} only goes with --no_ssh.\n  Other launchers number the nodes."
        )
    if args.elastic_training and not args.master_addr:
        raise DeepSpeedError("--elastic_training needs --master_addr, where nodes come and go.\n  Give rank 0's host.")
    if args.elastic_training and args.no_local_rank:
        raise DeepSpeedError("--elastic_training does not go with --no_local_rank.\n  Leave one of them out.")
    if args.launcher.lower() not in LAUNCHERS:
        raise NotAvailableError(f"--launcher {args.launcher} is not known.\n  Use one of {', '.join(LAUNCHERS)}.")


def find_world(args: argparse.Namespace, environ: MutableMapping[str, str], platform: Platform | None) -> World:
    """The slots to run on, by host.

    From the hostfile where there is one, else this machine's devices; then the filters, then the counts. A
    visible-devices variable that lists indices is taken as an --include and removed from `environ`.
    """
    if args.hostfile.is_file():
        pool, include = hostfile.read_hostfile(args.hostfile), args.include
        _take_visible_devices(environ, platform)
    else:
        if args.hostfile != HOSTFILE:
            logger.warning("no hostfile at %s, using this machine only", args.hostfile)
        if args.num_nodes > 1:
            raise DeepSpeedError(
                f"--num_nodes {args.num_nodes} needs a hostfile, and there is none at {args.hostfile}.\n"
                '  Write one line "<host> slots=<n>" per machine and name the file with --hostfile.'
            )
        pool, include = _local_pool(args, environ, platform)
    world = hostfile.select(pool, include, args.exclude)
    return hostfile.first(world, args.num_nodes, args.num_gpus)


def _local_pool(
    args: argparse.Namespace, environ: MutableMapping[str, str], platform: Platform | None
) -> tuple[dict[str, int], str]:
    """This machine's pool, and the filter on it."""
    visible = _take_visible_devices(environ, platform)
    if visible and not (args.include or args.exclude or args.num_gpus > 0):
        return {"localhost": max(visible) + 1}, f"localhost:{','.join(map(str, visible))}"
    if visible:
        logger.info("%s is ignored: the flags say which devices to use", platform.visible_devices if platform else "")
    # --num_gpus is taken at its word, so nothing has to be counted.
    return {"localhost": args.num_gpus if args.num_gpus > 0 else _device_count(platform, environ)}, args.include


def _take_visible_devices(environ: MutableMapping[str, str], platform: Platform | None) -> list[int]:
    """The indices in the visible-devices variable, which is removed; ids that are no indices stay where they are."""
    if platform is None or platform.name == "cpu" or platform.visible_devices is None:
        return []
    ids = [part.strip() for part in environ.get(platform.visible_devices, "").split(",")]
    if not all(part.isdecimal() for part in ids):
        return []
    del environ[platform.visible_devices]
    return [int(part) for part in ids]


def _device_count(platform: Platform | None, environ: Mapping[str, str]) -> int:
    if platform is not None and platform.name == "cpu":
        return cpu_device_count(environ)
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().device_count()


def _platform(environ: Mapping[str, str]) -> Platform:
    known = known_without_torch(environ)
    if known is None:
        from deepspeed.accelerator import get_accelerator

        known = get_accelerator().platform
    return known


def make_job(args: argparse.Namespace, environ: MutableMapping[str, str]) -> Job:
    """The job that the arguments ask for, but for the port, which is the flag's or the default."""
    platform = _platform(environ)
    world = find_world(args, environ, platform)
    if (len(world) > 1 or args.force_multi) and not args.no_ssh:
        raise NotAvailableError(
            f"{len(world)} hosts ({', '.join(world)}) need --launcher {args.launcher}, which this version does not have "
            "yet.\n  Run the same command on every node with --no_ssh --node_rank N --master_addr HOST."
        )
    node_rank = max(0, args.node_rank)
    if node_rank >= len(world):
        raise DeepSpeedError(f"--node_rank {node_rank} is not in [0, {len(world)}): hosts are {', '.join(world)}.")
    if len(world) > 1 and not args.master_addr:
        raise DeepSpeedError("--no_ssh with several hosts needs --master_addr.\n  Give the first host's address.")
    visible = platform.visible_devices
    options = job_options(args, platform, len(list(world.values())[node_rank]))
    if visible and visible in environ:  # ids that are no indices: the caller's choice stands
        options["visible_devices"] = None
    return Job(
        world=world,
        node_rank=node_rank,
        master_addr=args.master_addr or "127.0.0.1",
        master_port=args.master_port or DEFAULT_PORT,
        script=args.user_script,
        script_args=args.user_args,
        **options,  # type: ignore[arg-type]
    )


@contextlib.contextmanager
def meeting_port(asked: int | None, *, may_choose: bool) -> Iterator[int]:
    """The port ranks meet at, kept from other launchers on this machine while open.

    `asked` is --master_port. Without it and with `may_choose` (one node), another free port replaces a default that is
    taken. Raises DeepSpeedError where `asked` is taken.
    """
    port = asked or DEFAULT_PORT
    kept = reserve_port(port)
    if kept is None and asked is None and may_choose:
        kept = reserve_port(0)
    if kept is None and not is_free(port):
        raise DeepSpeedError(
            f"--master_port {port} is taken on this machine.\n"
            "  Give another one, or leave the flag out to have a free one chosen."
        )
    with kept or contextlib.nullcontext():
        yield kept.getsockname()[1] if kept else port


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; the exit code."""
    for flag, is_used in (("--autotuning", args.autotuning), ("--elastic_training", args.elastic_training)):
        if is_used:
            raise NotAvailableError(f"{flag} is not available in this version yet.\n  Leave the flag out.")
    job = make_job(args, os.environ)
    with pid_file(os.getpid() if args.save_pid else None), contextlib.ExitStack() as stack:
        if job.node_rank == 0:
            port = stack.enter_context(meeting_port(args.master_port, may_choose=len(job.world) == 1))
            job = dataclasses.replace(job, master_port=port)
        return LocalBackend().run(job)


def main(args: Sequence[str] | None = None) -> int:
    """The `deepspeed` command; returns the exit code. Without `args`, those of the command line.

    Called as a command, it prints what is wrong with its arguments; called with `args`, it raises DeepSpeedError.
    """
    words = sys.argv[1:] if args is None else args
    if not words:
        _parser().print_help()
        return 0
    code = run_command(words)
    if code is not None:
        return code
    try:
        parsed = parse_args(args)
        set_up_logging(parsed)
        return run(parsed)
    except DeepSpeedError as error:
        if args is not None:
            raise
        print(f"deepspeed: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

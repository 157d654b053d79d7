"""The `deepspeed` command's flags, and which of them contradict each other. Used by `runner`.

Source: the public contract of the original's command line; ours are --env_file, --control_addr, --control_port,
--no_control, --grace_period and --start_timeout.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from deepspeed.launcher.agent import DEFAULT_PORT
from deepspeed.launcher.commands import COMMANDS
from deepspeed.launcher.coordinator import START_S
from deepspeed.launcher.hostfile import MAX_SLOTS, is_host
from deepspeed.launcher.launch import add_elastic_arguments, add_job_arguments
from deepspeed.launcher.starters import STARTERS
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError

HOSTFILE = Path("/job/hostfile")


def _autotuning_word(word: str) -> str:
    """tune or run. Raises ArgumentTypeError for anything else, a script's name above all."""
    if word not in ("", "tune", "run"):
        raise argparse.ArgumentTypeError(
            f"the word after --autotuning is tune or run, not {word}.\n"
            "  tune writes the best configuration, run also trains with it: "
            "deepspeed --autotuning tune train.py --deepspeed_config ds.json"
        )
    return word


def make_parser() -> argparse.ArgumentParser:
    """The parser, without the checks."""
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
    meet.add_argument("--master_addr", default="", help="rank 0's host; by default found out")
    _add_several_machines(parser)
    add_elastic_arguments(parser, "--elastic_training")
    parser.add_argument("--run_dir", type=Path, help="folder of the run's record; sets DS_RUN_DIR for the ranks")
    parser.add_argument("--save_pid", action="store_true", help="write our process id to <tmp>/<id>.deepspeed")
    parser.add_argument(
        "--autotuning",
        metavar="{tune,run}",
        type=_autotuning_word,
        default="",
        help="search for the fastest configuration of the script; run: then train with it",
    )
    add_job_arguments(parser)
    parser.add_argument("user_script", help="what to start")
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _add_several_machines(parser: argparse.ArgumentParser) -> None:
    multi = parser.add_argument_group("several machines")
    multi.add_argument("--launcher", default="pdsh", help=f"one of {', '.join(STARTERS)} (%(default)s)")
    multi.add_argument("--launcher_args", default="", help="more arguments for that launcher, as one string")
    multi.add_argument("--no_ssh", action="store_true", help="start this node's ranks only; run this on every node")
    multi.add_argument("--no_ssh_check", action="store_true", help="do not try whether ssh works first")
    multi.add_argument("--force_multi", action="store_true", help="use the launcher for one host, too")
    multi.add_argument("--ssh_port", type=int, help="ssh's port on the hosts")
    multi.add_argument("--venv_script", type=Path, help="a script to source on the hosts first (pdsh, ssh)")
    multi.add_argument(
        "--env_file",
        metavar="FILE",
        help="variables for the hosts, in the home and this directory (default: DS_ENV_FILE)",
    )
    multi.add_argument("--control_addr", default="", metavar="HOST", help="this machine's address as the hosts see it")
    multi.add_argument(
        "--control_port",
        type=int,
        default=0,
        help="port at which hosts report; by default a free one, or with --no_ssh the master port plus 1000",
    )
    multi.add_argument(
        "--no_control", action="store_true", help="do not have the hosts report (they cannot connect here)"
    )
    multi.add_argument(
        "--start_timeout",
        type=float,
        default=-1,
        metavar="S",
        help=f"seconds for all hosts to come up (default {START_S:g}; 600 with --no_ssh)",
    )


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace. Raises DeepSpeedError for flags that contradict each other."""
    parsed = make_parser().parse_args(args)
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
    if args.num_gpus > MAX_SLOTS:
        raise DeepSpeedError(
            f"--num_gpus {args.num_gpus} is more than {MAX_SLOTS}.\n  Count the devices of one machine."
        )
    for flag, port in (
        ("--master_port", args.master_port),
        ("--ssh_port", args.ssh_port),
        ("--control_port", args.control_port or None),
    ):
        if port is not None and not 1 <= port <= 65535:
            raise DeepSpeedError(f"{flag} {port} is no TCP port.\n  Give a number from 1 to 65535.")
    for flag, host in (("--master_addr", args.master_addr), ("--control_addr", args.control_addr)):
        if host and not is_host(host):
            raise DeepSpeedError(f"{flag} {host!r} is no host name and no IP address.\n  Leave ports and users out.")
    if not 0 <= args.grace_period < math.inf:
        raise DeepSpeedError(f"--grace_period {args.grace_period:g} is no time.\n  Give seconds, 0 or more.")
    if args.start_timeout != -1 and not 0 < args.start_timeout < math.inf:
        raise DeepSpeedError(f"--start_timeout {args.start_timeout:g} is no time.\n  Give seconds, more than 0.")
    try:
        shlex.split(args.launcher_args)
    except ValueError as error:
        raise DeepSpeedError(
            f"--launcher_args {args.launcher_args!r} is not a command line: {error}.\n  Quote it as in a shell."
        ) from None
    if args.node_rank >= 0 and not args.no_ssh:
        raise DeepSpeedError(
            f"--node_rank {args.node_rank} only goes with --no_ssh.\n  Other launchers number the nodes."
        )
    if args.elastic_training and not args.master_addr:
        raise DeepSpeedError("--elastic_training needs --master_addr, where nodes come and go.\n  Give rank 0's host.")
    if args.elastic_training and args.no_local_rank:
        raise DeepSpeedError("--elastic_training does not go with --no_local_rank.\n  Leave one of them out.")
    if args.launcher.lower() not in STARTERS:
        raise NotAvailableError(f"--launcher {args.launcher} is not known.\n  Use one of {', '.join(STARTERS)}.")
    if args.elastic_training and STARTERS[args.launcher.lower()].members_are_ranks:
        raise DeepSpeedError(
            f"--elastic_training does not go with --launcher {args.launcher}, whose number of ranks is fixed.\n"
            "  Use pdsh or ssh, or start the nodes by hand with --no_ssh."
        )


def node_flags(args: argparse.Namespace) -> list[str]:
    """Those flags that a node's launcher and a rank's helper understand too, as they were given."""
    flags = [f"--{name}" for name in ("module", "no_python", "bind_cores_to_rank", "quiet") if getattr(args, name)]
    flags += [f"--enable_each_rank_log={args.enable_each_rank_log}"] if args.enable_each_rank_log != "None" else []
    flags += [f"--bind_core_list={args.bind_core_list}"] if args.bind_core_list else []
    return [*flags, f"--log_level={args.log_level}", f"--grace_period={args.grace_period:g}"]


def launch_flags(args: argparse.Namespace) -> list[str]:
    """Those that only a node's launcher understands."""
    flags = ["--no_local_rank"] if args.no_local_rank else []
    if args.elastic_training:
        limits = [f"--min_elastic_nodes={args.min_elastic_nodes}", f"--max_elastic_nodes={args.max_elastic_nodes}"]
        flags += ["--enable_elastic_training", *limits]
    return flags

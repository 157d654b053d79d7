"""The `deepspeed` command: find the machines and devices, choose a meeting point, start the script on every slot.

Everything after the script's name goes to the script verbatim. On one node `launch.run_here` runs the job in this
process; on several, `remote` has one of the `starters` start it there; with --no_ssh this process is one node's part of
it, and node 0's holds the coordinator for all.

Invariant: nothing here imports torch unless devices have to be counted, so that the command answers at once.
Source: the public contract of the original's command line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import os
import shlex
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from deepspeed.accelerator.platforms import Platform, cpu_device_count, known_without_torch
from deepspeed.launcher import arguments, hostfile
from deepspeed.launcher.agent import DEFAULT_PORT, Membership, meeting_port, take_part
from deepspeed.launcher.arguments import HOSTFILE, make_parser, parse_args
from deepspeed.launcher.commands import run_command
from deepspeed.launcher.control import TOKEN_VARIABLE, address_towards, is_here, new_token
from deepspeed.launcher.coordinator import START_S, Coordinator
from deepspeed.launcher.hostfile import World, encode_world, fetch_hostfile, parse_inclusion_exclusion  # noqa: F401 - scripts
from deepspeed.launcher.job import Job
from deepspeed.launcher.launch import elastic_of, job_options, logger, pid_file, run_here, set_up_logging
from deepspeed.launcher.outlet import open_standard_streams
from deepspeed.launcher.remote import RemoteRun, check_reachable
from deepspeed.launcher.starters import STARTERS, Plan, Starter
from deepspeed.launcher.variables import FILE_NAME, PREFIXES, exported
from deepspeed.utils.errors import DeepSpeedError, LaunchError
from deepspeed.utils.launch_env import expand_hosts

DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", FILE_NAME)
"""The file with variables for remote nodes; Accelerate appends to it."""

DLTS_HOSTFILE = str(HOSTFILE)
EXPORT_ENVS = list(PREFIXES)
"""Under these names scripts look for the default hostfile and for the prefixes of variables that go along."""

AUTOTUNER = "deepspeed.autotuning.autotuner"
"""What --autotuning starts; it starts this command for every trial."""

BY_HAND_START_S = 600.0
"""How long nodes that are started by hand may be apart."""
CONTROL_PORT_OFFSET = 1000
"""With --no_ssh, from the master port to node 0's control port."""


def find_world(args: argparse.Namespace, environ: MutableMapping[str, str], platform: Platform | None) -> World:
    """The slots to run on, by host.

    From the hostfile where there is one, else Slurm's allocation with its launcher, else this machine's devices; then
    the filters, then the counts. A visible-devices variable that lists indices is taken as an --include and removed
    from `environ`.
    """
    if args.hostfile.is_file():
        pool, include = hostfile.read_hostfile(args.hostfile), args.include
        _take_visible_devices(environ, platform)
    elif args.launcher.lower() == "slurm" and environ.get("SLURM_JOB_NODELIST") and not args.no_ssh:
        slots = args.num_gpus if args.num_gpus > 0 else _slurm_slots(environ, platform)
        pool, include = dict.fromkeys(expand_hosts(environ["SLURM_JOB_NODELIST"]), slots), args.include
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


def _slurm_slots(environ: Mapping[str, str], platform: Platform | None) -> int:
    """Ranks per node of an allocation: its tasks per node, else its GPUs, else what this machine has."""
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return _device_count(platform, environ)


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
    """This process's part of the job that the arguments ask for; port 0 where they name none."""
    platform = _platform(environ)
    return _job(args, environ, platform, find_world(args, environ, platform))


def _job(args: argparse.Namespace, environ: Mapping[str, str], platform: Platform, world: World) -> Job:
    node_rank = max(0, args.node_rank)
    if node_rank >= len(world):
        raise DeepSpeedError(f"--node_rank {node_rank} is not in [0, {len(world)}): hosts are {', '.join(world)}.")
    if len(world) > 1 and not args.master_addr:
        raise DeepSpeedError("--no_ssh with several hosts needs --master_addr.\n  Give the first host's address.")
    if args.node_rank < 0 and len(world) > 1:
        raise DeepSpeedError(
            f"--no_ssh with several hosts needs --node_rank, this one's place among {', '.join(world)}.\n"
            "  Give 0 on the first, 1 on the second, and so on."
        )
    visible = platform.visible_devices
    options = job_options(args, platform, len(list(world.values())[node_rank]))
    if visible and visible in environ:  # ids that are no indices: the caller's choice stands
        options["visible_devices"] = None
    return Job(
        world=world,
        node_rank=node_rank,
        master_addr=args.master_addr or "127.0.0.1",
        master_port=args.master_port or 0,
        script=args.user_script,
        script_args=args.user_args,
        elastic=elastic_of(args, len(world)),
        **options,  # type: ignore[arg-type]
    )


def run(args: argparse.Namespace) -> int:
    """Do what the arguments ask for; the exit code."""
    if args.run_dir:
        os.environ["DS_RUN_DIR"] = str(args.run_dir.absolute())
    platform = _platform(os.environ)
    world = find_world(args, os.environ, platform)
    if args.autotuning:
        return int(importlib.import_module(AUTOTUNER).main(args, world))
    with pid_file(os.getpid() if args.save_pid else None):
        if (len(world) > 1 or args.force_multi) and not args.no_ssh:
            return run_remote(args, world, platform)
        job = _job(args, os.environ, platform, world)
        if len(world) == 1 and not args.no_ssh and not is_here(job.host):
            logger.warning("%s is not this machine, but its ranks run here; --force_multi starts them there", job.host)
        if len(world) > 1 and not args.no_control:
            return run_by_hand(args, job)
        with contextlib.ExitStack() as stack:
            if job.node_rank == 0:
                port = stack.enter_context(meeting_port(args.master_port, may_choose=len(world) == 1))
            else:
                port = job.master_port or DEFAULT_PORT
            return run_here(dataclasses.replace(job, master_port=port), grace_s=args.grace_period)


def run_remote(args: argparse.Namespace, world: World, platform: Platform) -> int:
    """Start the job on its hosts from here."""
    starter = _starter(args)
    if starter.needs_ssh and not args.no_ssh_check:
        check_reachable(list(world), args.ssh_port)
    elastic = elastic_of(args, len(world))
    port = args.master_port or (DEFAULT_PORT if elastic or args.no_control else 0)
    variables = exported(os.environ, platform, Path.cwd(), Path.home(), args.env_file)
    coordinator = None
    if args.no_control:
        if not args.master_addr:
            raise DeepSpeedError("--no_control needs --master_addr.\n  Give the first host's address.")
    else:
        variables[TOKEN_VARIABLE] = new_token()
        members = _member_names(world, starter)
        coordinator = Coordinator(
            members,
            variables[TOKEN_VARIABLE],
            grace_s=args.grace_period,
            bind=("", args.control_port),
            master=(args.master_addr, port),
            min_members=elastic.min_nodes if elastic else None,
            start_s=args.start_timeout if args.start_timeout > 0 else START_S,
            may_queue=starter.may_queue(os.environ),
            check_versions=not os.environ.get("DS_SKIP_VERSION_CHECK"),
        )
    if args.venv_script and starter.members_are_ranks:
        logger.warning("--venv_script has no effect with --launcher %s; source it before this command", starter.name)
    plan = Plan(
        world=world,
        script=args.user_script,
        script_args=args.user_args,
        flags=[*arguments.node_flags(args), *([] if starter.members_are_ranks else arguments.launch_flags(args))],
        variables=variables,
        environ=os.environ,
        cwd=os.getcwd(),
        control=f"{args.control_addr or _address_for(world)}:{coordinator.port}" if coordinator else None,
        master_addr=args.master_addr,
        master_port=port,
        launcher_args=shlex.split(args.launcher_args),
        ssh_port=args.ssh_port,
        venv_script=str(args.venv_script) if args.venv_script else None,
        names_hosts=args.hostfile.is_file(),
    )
    return RemoteRun(plan, starter, coordinator, retries_nodes=elastic is not None).run()


def _starter(args: argparse.Namespace) -> Starter:
    """The launcher asked for. Elastic training starts its nodes one by one, so that a lost one can be started again."""
    starter = STARTERS[args.launcher.lower()]
    if starter.name == "pdsh" and args.elastic_training:
        starter = STARTERS["ssh"]
    if starter.detect() is None:
        cure = "or use --launcher ssh" if starter.name == "pdsh" else "or use another --launcher"
        raise LaunchError(
            f"launcher '{starter.name}' not installed.\n  Install it, {cure} (there are {', '.join(STARTERS)})."
        )
    return starter


def _member_names(world: World, starter: Starter) -> list[str]:
    if starter.members_are_ranks:
        return [f"rank {rank}" for rank in range(sum(map(len, world.values())))]
    return [f"node {host}" for host in world]


def _address_for(world: World) -> str:
    """This machine's address as the hosts see it."""
    addresses = [address for address in map(address_towards, world) if address]
    outside = [address for address in addresses if not address.startswith("127.") and address != "::1"]
    if not addresses:
        raise DeepSpeedError(
            f"no way to any of {', '.join(world)} is known here.\n"
            "  Check that the names resolve, or give this machine's address with --control_addr."
        )
    address = (outside or addresses)[0]
    return f"[{address}]" if ":" in address else address


def run_by_hand(args: argparse.Namespace, job: Job) -> int:
    """This node's part of a job whose nodes are started one by one, by hand or by Kubernetes."""
    port = args.master_port or DEFAULT_PORT
    control_port = args.control_port or port + CONTROL_PORT_OFFSET * (1 if port + CONTROL_PORT_OFFSET < 65536 else -1)
    # Without a secret of the user's, the token only keeps the nodes of different jobs apart.
    public = hashlib.sha256(f"{encode_world(job.world)} {args.master_addr} {port}".encode()).hexdigest()
    token = os.environ.get(TOKEN_VARIABLE) or public
    start_s = args.start_timeout if args.start_timeout > 0 else BY_HAND_START_S
    names = [f"node {host}" for host in job.world]
    coordinator = None
    if job.node_rank == 0 and not is_here(args.master_addr):
        logger.warning("--node_rank 0, but the others look for it at %s, which is not this machine", args.master_addr)
    if job.node_rank == 0:
        coordinator = Coordinator(
            names,
            token,
            grace_s=args.grace_period,
            bind=("", control_port),
            master=(args.master_addr, port),
            min_members=job.elastic.min_nodes if job.elastic else None,
            start_s=start_s,
            check_versions=not os.environ.get("DS_SKIP_VERSION_CHECK"),
        )
        coordinator.start()
    host = "127.0.0.1" if coordinator else args.control_addr or args.master_addr
    membership = Membership(
        address=f"[{host}]:{control_port}" if ":" in host else f"{host}:{control_port}",
        token=token,
        index=job.node_rank,
        name=names[job.node_rank],
        connect_s=start_s,
        tells=True,
    )
    code = take_part(
        membership,
        lambda: dataclasses.replace(job, master_port=port),
        lambda joined, link: run_here(joined, link=link, grace_s=args.grace_period, tells=True),
    )
    if coordinator is not None:
        coordinator.done.wait()
        code = coordinator.code
    return code


def main(args: Sequence[str] | None = None) -> int:
    """The `deepspeed` command; returns the exit code. Without `args`, those of the command line.

    Called as a command, it prints what is wrong with its arguments; called with `args`, it raises DeepSpeedError.
    """
    open_standard_streams()
    words = sys.argv[1:] if args is None else args
    if not words:
        make_parser().print_help()
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

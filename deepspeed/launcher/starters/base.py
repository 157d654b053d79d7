"""What a way of starting a job on several nodes has to do: say whether it is installed, and give the commands.

`remote` runs the commands; nothing here starts anything but `--version` questions. Commands are argument lists. A shell
is involved only where ssh involves one, on the other side: `remote_line` is the one string that reaches it, and every
word of it goes through `shlex.quote`.

Invariant: a host, a value or an argument can never become a flag or a command. Hosts are checked where they are read
(`hostfile.is_host`), and come after `--` where a program has that.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from deepspeed.launcher.hostfile import World, encode_world
from deepspeed.utils.errors import DeepSpeedError

_NO_VENV = 'echo "deepspeed: --venv_script $0 cannot be read on $(uname -n)." >&2; exit 2'


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is to run, on which hosts."""

    world: World
    script: str
    script_args: Sequence[str]
    flags: Sequence[str]
    """Of the `deepspeed` command, those that a node's launcher and a rank's helper understand too."""
    variables: Mapping[str, str]
    """Environment for the nodes."""
    environ: Mapping[str, str]
    """The caller's environment, for the starting program itself."""
    cwd: str
    control: str | None
    """host:port of the coordinator."""
    master_addr: str = ""
    master_port: int = 0
    """Where ranks meet; "" and 0 where the first node is to propose it."""
    launcher_args: Sequence[str] = ()
    ssh_port: int | None = None
    venv_script: str | None = None
    python: str = sys.executable
    names_hosts: bool = True
    """Whether the world's hosts have to be named to the starting program; Slurm knows those of its allocation."""

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return sum(map(len, self.world.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One program to run here. `host` is the node it starts; None means all of them."""

    argv: Sequence[str]
    environ: Mapping[str, str]
    host: str | None = None


class Starter(ABC):
    """One launcher."""

    name: ClassVar[str]
    members_are_ranks: ClassVar[bool]
    """Whether it starts every rank itself (MPI, Slurm), or one launcher per node."""
    needs_ssh: ClassVar[bool] = True

    @abstractmethod
    def detect(self) -> str | None:
        """The program, if it is installed."""

    @abstractmethod
    def command(self, plan: Plan) -> list[Start]:
        """What to run. Raises DeepSpeedError where the program cannot do what the plan asks for."""

    def may_queue(self, environ: Mapping[str, str]) -> bool:
        """Whether it may wait for the nodes to become free, for hours."""
        return False

    def failed_host(self, line: bytes) -> tuple[str, int] | None:
        """The host and the exit code, where a line of the program's stderr says that a host failed."""
        return None


def remote_line(plan: Plan, node_rank: int | str) -> str:
    """What the shell on a node is to run."""
    words = [
        plan.python,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={encode_world(plan.world)}",
        f"--node_rank={node_rank}",
        *meeting_flags(plan),
        *plan.flags,
        plan.script,
        *plan.script_args,
    ]
    exports = [f"export {name}={shlex.quote(value)};" for name, value in sorted(plan.variables.items())]
    source = []
    if plan.venv_script:
        script = shlex.quote(plan.venv_script)
        # bash goes on where it cannot source a file, and would run some other python.
        source = [f"test -r {script} || exec sh -c {shlex.quote(_NO_VENV)} {script};", f". {script};"]
    return " ".join([*exports, *source, "cd", shlex.quote(plan.cwd), "&&", "exec", shlex.join(words)])


def rank_words(plan: Plan, launcher: str) -> list[str]:
    """The helper that an MPI or Slurm starts once per rank, and what it is to run."""
    helper = [plan.python, "-u", "-m", "deepspeed.launcher.launcher_helper", "--launcher", launcher]
    return [
        *helper,
        *meeting_flags(plan),
        f"--hosts={','.join(plan.world)}",
        *plan.flags,
        plan.script,
        *plan.script_args,
    ]


def meeting_flags(plan: Plan) -> list[str]:
    """Where members meet the coordinator, and ranks each other."""
    control = [f"--control={plan.control}"] if plan.control else []
    return [*control, f"--master_addr={plan.master_addr}", f"--master_port={plan.master_port}"]


def require_equal_slots(plan: Plan, launcher: str) -> int:
    """The ranks per node. Raises DeepSpeedError where nodes differ in them."""
    counts = {host: len(slots) for host, slots in plan.world.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{host} {count}" for host, count in counts.items())
        raise DeepSpeedError(
            f"--launcher {launcher} starts equally many ranks on every node, but slots are {listed}.\n"
            "  Use --num_gpus to take the same number everywhere, or --launcher ssh."
        )
    return next(iter(counts.values()))


def require_first_slots(plan: Plan, launcher: str) -> None:
    """Raise DeepSpeedError where particular devices are asked for: ranks take theirs by local rank."""
    for host, slots in plan.world.items():
        if list(slots) != list(range(len(slots))):
            raise DeepSpeedError(
                f"--launcher {launcher} cannot choose devices, but {host} is to use {','.join(map(str, slots))}.\n"
                "  Leave the slots out of --include and --exclude (--num_gpus counts them), or use --launcher ssh."
            )


def find_program(names: Sequence[str], version: str, flag: str = "--version") -> str | None:
    """The first of these programs whose `--version` text matches."""
    for name in names:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            told = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if re.search(version, told.stdout + told.stderr, re.IGNORECASE):
            return path
    return None

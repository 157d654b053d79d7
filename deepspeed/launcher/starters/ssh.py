"""ssh, once per node: needs nothing but OpenSSH and a key. The default where pdsh is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import final

from deepspeed.launcher.starters.base import Plan, Start, Starter, remote_line

OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
    "-n",
    "-T",
)
"""Never ask for a password, give up soon, notice a cut network, read no input, want no terminal."""


def ssh_words(host: str, port: int | None, options: Sequence[str] = ()) -> list[str]:
    """ssh to a host, up to the command."""
    return ["ssh", *OPTIONS, *(["-p", str(port)] if port else []), *options, "--", host]


@final
class Ssh(Starter):
    """See the module."""

    name = "ssh"
    members_are_ranks = False

    def detect(self) -> str | None:
        """See Starter."""
        return shutil.which("ssh")

    def command(self, plan: Plan) -> list[Start]:
        """See Starter."""
        return [
            Start(
                argv=[*ssh_words(host, plan.ssh_port, plan.launcher_args), remote_line(plan, node_rank)],
                environ=plan.environ,
                host=host,
            )
            for node_rank, host in enumerate(plan.world)
        ]

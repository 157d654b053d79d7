"""pdsh over ssh: one program for all nodes. Source: pdsh(1).

pdsh replaces %n by a node's number, %h by its name and %% by a percent sign in the command, before the node's shell
sees it; so every other percent sign is doubled.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
from contextlib import suppress
from typing import final

from deepspeed.launcher.starters.base import Plan, Start, Starter, remote_line
from deepspeed.utils.errors import DeepSpeedError

_FAILED = re.compile(rb"pdsh@[^:]*: ([^:\s]+): ssh exited with exit code (\d+)")
_NUMBER = "0x-node-rank-x0"
"""Stands for %n until the percent signs are doubled."""


@final
class Pdsh(Starter):
    """See the module."""

    name = "pdsh"
    members_are_ranks = False

    def detect(self) -> str | None:
        """See Starter."""
        return shutil.which("pdsh")

    def command(self, plan: Plan) -> list[Start]:
        """See Starter."""
        for host in plan.world:
            with suppress(ValueError):
                if ipaddress.ip_address(host).version == 6:
                    raise DeepSpeedError(f"pdsh takes no IPv6 address ({host}).\n  Use --launcher ssh, or a name.")
        line = remote_line(plan, _NUMBER).replace("%", "%%").replace(_NUMBER, "%n")
        options = "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
        port = f" -p {plan.ssh_port}" if plan.ssh_port else ""
        environ = {
            **plan.environ,
            "PDSH_RCMD_TYPE": "ssh",
            "PDSH_SSH_ARGS_APPEND": f"{plan.environ.get('PDSH_SSH_ARGS_APPEND', '')} {options}{port}".strip(),
        }
        argv = ["pdsh", "-S", "-f", "1024", "-w", ",".join(plan.world), *plan.launcher_args, line]
        return [Start(argv=argv, environ=environ)]

    def failed_host(self, line: bytes) -> tuple[str, int] | None:
        """See Starter."""
        match = _FAILED.search(line)
        return (match[1].decode(), int(match[2])) if match else None

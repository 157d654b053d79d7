"""Open MPI's mpirun. Source: mpirun(1) of Open MPI 4 and 5.

Ranks talk through torch.distributed, not through MPI; so no transport is configured, and ranks are not bound to cores
by default, which would leave all threads of a rank on one core. Variables travel by name (-x NAME) from mpirun's own
environment, so that their values appear in no process list.
"""

from __future__ import annotations

from typing import final

from deepspeed.launcher.starters.base import Plan, Start, Starter, find_program, rank_words, require_first_slots

_KEEPALIVE = {"oob_tcp_keepalive_time": "5", "oob_tcp_keepalive_intvl": "2", "oob_tcp_keepalive_probes": "3"}
"""Seconds, seconds, and how many: after a cut network its daemons end; by default they would stay for minutes."""


@final
class OpenMpi(Starter):
    """See the module."""

    name = "openmpi"
    members_are_ranks = True

    def detect(self) -> str | None:
        """See Starter."""
        return find_program(["mpirun.openmpi", "mpirun", "mpiexec"], r"Open ?MPI|OpenRTE|PRTE")

    def command(self, plan: Plan) -> list[Start]:
        """See Starter."""
        require_first_slots(plan, self.name)
        hosts = ",".join(f"{host}:{len(slots)}" for host, slots in plan.world.items())
        variables = {"UCX_TLS": "tcp", **plan.variables}
        argv = [self.detect() or "mpirun", "-n", str(plan.num_ranks), "--host", hosts, "--mca", "btl", "^openib"]
        if not any(word in ("--bind-to", "-bind-to") for word in plan.launcher_args):
            argv += ["--bind-to", "none"]
        port = f" -p {plan.ssh_port}" if plan.ssh_port else ""
        argv += ["--mca", "plm_rsh_args", f"-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3{port}"]
        for name, value in _KEEPALIVE.items():
            argv += ["--mca", name, value]
        argv += plan.launcher_args
        for name in sorted(variables):
            argv += ["-x", name]
        return [Start(argv=[*argv, *rank_words(plan, self.name)], environ={**plan.environ, **variables})]

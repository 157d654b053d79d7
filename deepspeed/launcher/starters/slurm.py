"""Slurm's srun, inside an allocation or from a login node. Source: srun(1).

The variables are put into srun's own environment, all of which `--export=ALL` sends; `--export=ALL,NAME=VALUE` would cut
a value at its first comma. Slurm numbers the ranks in its own order of nodes, so it is not told where they meet: the
first rank says so to the coordinator.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import final

from deepspeed.launcher.starters.base import (
    Plan,
    Start,
    Starter,
    rank_words,
    require_equal_slots,
    require_first_slots,
)


@final
class Slurm(Starter):
    """See the module."""

    name = "slurm"
    members_are_ranks = True
    needs_ssh = False

    def detect(self) -> str | None:
        """See Starter."""
        return shutil.which("srun") if shutil.which("sinfo") else None

    def may_queue(self, environ: Mapping[str, str]) -> bool:
        """See Starter: outside of an allocation."""
        return "SLURM_JOB_ID" not in environ

    def command(self, plan: Plan) -> list[Start]:
        """See Starter."""
        require_first_slots(plan, self.name)
        per_node = require_equal_slots(plan, self.name)
        argv = ["srun", "-n", str(plan.num_ranks), "--ntasks-per-node", str(per_node), "--nodes", str(len(plan.world))]
        if plan.names_hosts:
            argv += ["--nodelist", ",".join(plan.world)]
        argv += [*plan.launcher_args, "--kill-on-bad-exit=1", "--export=ALL"]
        return [Start(argv=[*argv, *rank_words(plan, self.name)], environ={**plan.environ, **plan.variables})]

"""The family of mpirun that is built on Hydra: MPICH, Intel MPI and MVAPICH2.

They share their flags (-n, -ppn, -hosts, -genvall) and differ in the variables they need. Variables travel in mpirun's
own environment, all of which -genvall sends, so that their values appear in no process list. Source: mpiexec(1) of MPICH, Intel MPI's developer reference, the MVAPICH2-GDR guide.
"""

from __future__ import annotations

import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Mapping
from typing import final

from deepspeed.launcher.starters.base import (
    Plan,
    Start,
    Starter,
    find_program,
    rank_words,
    require_equal_slots,
    require_first_slots,
)
from deepspeed.utils.errors import DeepSpeedError


class Hydra(Starter):
    """What the family shares."""

    members_are_ranks = True

    @abstractmethod
    def extra(self) -> Mapping[str, str]:
        """Variables this member of the family needs."""

    def command(self, plan: Plan) -> list[Start]:
        """See Starter."""
        require_first_slots(plan, self.name)
        per_node = require_equal_slots(plan, self.name)
        if plan.ssh_port:
            raise DeepSpeedError(
                f"--ssh_port {plan.ssh_port}: {self.name}'s mpirun cannot pass a port to ssh.\n"
                "  Write the port into ~/.ssh/config (Host, Port)."
            )
        variables = {**self.extra(), **plan.variables}
        argv = [self.detect() or "mpirun", "-n", str(plan.num_ranks), "-ppn", str(per_node), *plan.launcher_args]
        # Not -genvlist: Hydra 4.0.2 drops names of the list on remote nodes.
        argv += ["-hosts", ",".join(plan.world), "-genvall"]
        return [Start(argv=[*argv, *rank_words(plan, self.name)], environ={**plan.environ, **variables})]


@final
class Mpich(Hydra):
    """MPICH."""

    name = "mpich"

    def detect(self) -> str | None:
        """See Starter."""
        return find_program(["mpirun.mpich", "mpiexec.hydra", "mpirun"], r"HYDRA|MPICH")

    def extra(self) -> Mapping[str, str]:
        """See Hydra."""
        return {}


@final
class IntelMpi(Hydra):
    """Intel MPI. Its own pinning is off, because torch and --bind_cores_to_rank place threads."""

    name = "impi"

    def detect(self) -> str | None:
        """See Starter."""
        return find_program(["mpirun", "mpiexec.hydra"], r"Intel\(R\) MPI")

    def extra(self) -> Mapping[str, str]:
        """See Hydra."""
        return {"I_MPI_PIN": "0"}


@final
class Mvapich(Hydra):
    """MVAPICH2-GDR."""

    name = "mvapich"

    def detect(self) -> str | None:
        """See Starter."""
        teller = shutil.which("mpiname")
        if teller is None:
            return None
        told = subprocess.run([teller], capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
        return shutil.which("mpirun") if "MVAPICH2-GDR" in told.stdout else None

    def extra(self) -> Mapping[str, str]:
        """See Hydra. Shared memory without CMA (containers), backtraces, CUDA buffers, no affinity of its own."""
        return {
            "MV2_SMP_USE_CMA": "0",
            "MV2_DEBUG_SHOW_BACKTRACE": "1",
            "MV2_USE_CUDA": "1",
            "MV2_SUPPORT_DL": "1",
            "MV2_ENABLE_AFFINITY": "0",
            "MV2_INTER_ALLGATHER_TUNING": "5",
            "MV2_CUDA_USE_NAIVE": "0",
        }

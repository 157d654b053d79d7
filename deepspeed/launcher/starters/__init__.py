"""Ways of starting a job on several nodes, one class each, in a table by the name that --launcher takes.

base.py        what a starter does, and the one string that reaches a remote shell
ssh.py         OpenSSH alone          pdsh.py     pdsh over ssh
openmpi.py     Open MPI               hydra.py    MPICH, Intel MPI, MVAPICH2
slurm.py       srun
"""

from deepspeed.launcher.starters.base import Plan, Start, Starter
from deepspeed.launcher.starters.hydra import IntelMpi, Mpich, Mvapich
from deepspeed.launcher.starters.openmpi import OpenMpi
from deepspeed.launcher.starters.pdsh import Pdsh
from deepspeed.launcher.starters.slurm import Slurm
from deepspeed.launcher.starters.ssh import Ssh

STARTERS: dict[str, Starter] = {
    starter.name: starter for starter in (Pdsh(), Ssh(), OpenMpi(), Mvapich(), Slurm(), Mpich(), IntelMpi())
}

__all__ = ["STARTERS", "Plan", "Start", "Starter"]

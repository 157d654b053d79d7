"""Slurm on the cluster of `nodes`: munge everywhere, slurmctld on the head, slurmd on the other nodes."""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.cluster.nodes import Cluster

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
CONFIG = """
ClusterName=test
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
InactiveLimit=0
KillWait=5
StateSaveLocation={folder}/slurm_state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def start_slurm(cluster: Cluster) -> dict[str, str]:
    """Start it; the variables that its commands need."""
    folder = cluster.folder
    computing = [name for name in cluster.nodes if name != "head"]
    lines = [f"NodeName={n} NodeAddr={cluster[n].address} CPUs=1 RealMemory=512 State=UNKNOWN" for n in computing]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, nodes="\n".join(lines), names=",".join(computing)))
    (folder / "slurm_state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    os.chown(key, 0, 0)
    variables = {"SLURM_CONF": str(config)}
    environ = {**os.environ, **variables}
    for name, node in cluster.nodes.items():
        own = folder / f"munge_{name}"
        own.mkdir()
        node.run("mkdir", "-p", "/run/munge")
        node.run(
            "munged",
            "--force",
            f"--key-file={key}",
            "--socket=/run/munge/munge.socket.2",
            f"--log-file={own}/log",
            f"--pid-file={own}/pid",
            f"--seed-file={own}/seed",
        )
        if name != "head":
            (folder / f"spool_{name}").mkdir()
            node.run("slurmd", "-N", name, "-f", str(config), env=environ)
    cluster.head.run("slurmctld", "-f", str(config), env=environ)
    _wait_until_idle(cluster, len(computing), environ)
    return variables


def _wait_until_idle(cluster: Cluster, count: int, environ: dict[str, str]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            states = cluster.head.run("sinfo", "--noheader", "--Node", "--format=%T", env=environ).stdout.split()
        except AssertionError:
            states = []
        if states.count("idle") == count:
            return
        time.sleep(0.3)
    raise AssertionError(f"Slurm did not come up: {(Path(cluster.folder) / 'slurmctld.log').read_text()[-2000:]}")

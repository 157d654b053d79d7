"""Which cores each rank of a node runs on, as a numactl command. Pure but for the last three.

Used by `job` for --bind_cores_to_rank. Every rank gets an equal, contiguous piece of the list of physical cores; memory
is taken from the cores' NUMA node where all of them lie in one. Source: numactl(8), Linux's sysfs topology files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from deepspeed.utils.errors import DeepSpeedError

_SYSTEM = Path("/sys/devices/system")


def parse_cores(text: str) -> list[int]:
    """ "1,3-5" -> [1, 3, 4, 5]. Raises DeepSpeedError for anything else, and for a core that is listed twice."""
    cores: list[int] = []
    for part in text.strip().split(","):
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(low) > int(high)):
            raise DeepSpeedError(f'{part!r} in core list {text!r} is neither a core nor a range.\n  Write "1,3-5,7".')
        cores += range(int(low), int(high or low) + 1)
    if len(set(cores)) < len(cores):
        raise DeepSpeedError(f"core list {text!r} has a core twice.\n  List every core once.")
    return cores


def slice_of(cores: Sequence[int], local_rank: int, local_size: int) -> list[int]:
    """A rank's equal, contiguous share. Raises DeepSpeedError where there are fewer cores than ranks."""
    share = len(cores) // local_size
    if share < 1:
        raise DeepSpeedError(
            f"--bind_cores_to_rank: {len(cores)} cores are too few for {local_size} ranks.\n"
            "  Start fewer ranks (--num_accelerators), or list more cores (--bind_core_list)."
        )
    return list(cores[local_rank * share : (local_rank + 1) * share])


def numactl_command(cores: Sequence[int], nodes: Mapping[int, Sequence[int]]) -> list[str]:
    """numactl with these cores, and their NUMA node's memory where `nodes` {node: cores} has them all in one."""
    home = next((node for node, members in nodes.items() if set(cores) <= set(members)), None)
    memory = [] if home is None else ["-m", str(home)]
    return ["numactl", *memory, "-C", ",".join(ranges(cores))]


def ranges(cores: Iterable[int]) -> list[str]:
    """[1, 3, 4, 5] -> ["1", "3-5"]."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return [str(low) if low == high else f"{low}-{high}" for low, high in runs]


def allowed_cores() -> set[int]:
    """The logical cores this process may run on: fewer than the machine has in a container or under a batch system."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set(range(os.cpu_count() or 1))


def physical_cores(allowed: Collection[int], system: Path = _SYSTEM) -> list[int]:
    """One allowed logical core of every physical one, those of a NUMA node together (some machines number in turn)."""
    siblings = (path.read_text() for path in system.glob("cpu/cpu[0-9]*/topology/thread_siblings_list"))
    usable = ([core for core in parse_cores(text) if core in allowed] for text in siblings)
    node_of = {core: node for node, cores in numa_nodes(system).items() for core in cores}
    return sorted({cores[0] for cores in usable if cores}, key=lambda core: (node_of.get(core, 0), core))


def numa_nodes(system: Path = _SYSTEM) -> dict[int, list[int]]:
    """NUMA node -> its cores, for nodes that have cores."""
    lists = {int(path.parent.name[4:]): path.read_text().strip() for path in system.glob("node/node[0-9]*/cpulist")}
    return {node: parse_cores(text) for node, text in sorted(lists.items()) if text}

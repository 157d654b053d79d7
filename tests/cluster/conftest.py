"""One cluster for all tests of this folder, and the jobs that run on it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import slurm
from tests.cluster.nodes import Cluster, cluster, deepspeed, environment, why_not

LOOP = """
import datetime, os, subprocess, sys, time, torch, torch.distributed as dist, deepspeed
deepspeed.init_distributed(timeout=datetime.timedelta(seconds=float(os.environ.get("DS_TEST_TIMEOUT_S", "600"))))
subprocess.Popen(["tail", "-f", "/dev/null"])  # something that a rank leaves behind
folder, rank = sys.argv[-1], dist.get_rank()
open(f"{folder}/ready{rank}", "w").close()
until = time.monotonic() + 300
while time.monotonic() < until:
    dist.all_reduce(torch.ones(1))
    if os.path.exists(f"{folder}/raise{rank}"):
        raise ValueError(f"boom on {rank}")
    if os.path.exists(f"{folder}/hang{rank}"):
        time.sleep(300)
    time.sleep(0.01)
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say why where there can be no cluster, and give these tests the time they need."""
    here = Path(__file__).parent
    reason = why_not() if os.environ.get("DS_TEST_CLUSTER") else "runs with `make test-cluster` (DS_TEST_CLUSTER=1)"
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(240))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Head, a and b."""
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="session")
def slurm_variables(nodes: Cluster) -> dict[str, str]:
    """Slurm on those nodes."""
    reason = why_not(*slurm.PROGRAMS)
    if reason:
        pytest.skip(reason)
    return slurm.start_slurm(nodes)


class Running:
    """A job in its endless loop, and what became of it."""

    def __init__(self, nodes: Cluster, folder: Path, *flags: str, slots: int = 1, **variables: str) -> None:
        self.nodes = nodes
        self.folder = folder
        script = folder / "loop.py"
        script.write_text(LOOP)
        hostfile = nodes.hostfile(a=slots, b=slots)
        self._err = (folder / "err").open("w+")
        self.process = nodes.head.start(
            *deepspeed("-H", hostfile, *flags, str(script), str(folder)),
            env=environment(**variables),
            stdout=subprocess.DEVNULL,
            stderr=self._err,
            start_new_session=True,
        )
        assert until(lambda: all((folder / f"ready{r}").exists() for r in range(2 * slots)), 60), self.written()

    def pids(self, node: str, *parts: str) -> list[int]:
        """Processes on a node whose command has all of these parts."""
        return [pid for pid, line in self.nodes[node].processes().items() if all(part in line for part in parts)]

    def rank_pid(self, node: str) -> int:
        """The first rank on a node."""
        found = [
            p
            for p, line in self.nodes[node].processes().items()
            if "loop.py" in line and "deepspeed.launcher" not in line
        ]
        return min(found)

    def ends(self, within_s: float = 30.0) -> tuple[int, str, float]:
        """The launcher's exit code, what was written last, and seconds until nothing was left anywhere."""
        start = time.monotonic()
        over = until(lambda: self.process.poll() is not None and not self.nodes.leftovers(), within_s)
        took = time.monotonic() - start
        assert over, f"left after {took:.0f} s: {self.nodes.leftovers()}\n{self.written()}"
        return self.process.returncode, self.written(), took

    def written(self) -> str:
        """What the launcher has written to stderr."""
        return (self.folder / "err").read_text()

    def close(self) -> None:
        """End it whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self._err.close()
        for node in self.nodes.nodes.values():
            for pid in node.processes() if node.is_alive() else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def job(nodes: Cluster, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a job; ends it with the test."""
    started: list[Running] = []

    def start(*flags: str, **more: Any) -> Running:
        started.append(Running(nodes, tmp_path, *flags, **more))
        return started[-1]

    yield start
    for running in started:
        running.close()


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True

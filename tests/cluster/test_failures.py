"""Whatever happens to a job on two nodes: within 30 s everything has ended everywhere, and the message says why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import Running, until
from tests.cluster.nodes import Cluster, cluster, deepspeed, environment

Start = Callable[..., Running]
BY_NODE = ["pdsh", "ssh"]
BY_RANK = ["openmpi", "mpich", "slurm"]


@pytest.fixture
def start(job: Start, request: pytest.FixtureRequest) -> Start:
    """`job`, with Slurm's variables where it is Slurm's."""

    def begin(launcher: str, *flags: str, **more: object) -> Running:
        variables = request.getfixturevalue("slurm_variables") if launcher == "slurm" else {}
        return job("--launcher", launcher, *flags, **variables, **more)

    return begin


@pytest.fixture
def mended(nodes: Cluster) -> Iterator[None]:
    """Whatever the test does to node b is undone."""
    yield
    nodes.mend("b")


@pytest.mark.parametrize("launcher", BY_NODE + BY_RANK)
def test_a_killed_rank_ends_all_and_is_named(launcher: str, start: Start) -> None:
    running = start(launcher)
    os.kill(running.rank_pid("b"), signal.SIGKILL)
    code, written, _ = running.ends()
    assert code == 247
    assert "---- rank 1 failed first (host b, pid " in written
    assert "exit code -9, SIGKILL: killed from outside, probably because memory ran out" in written


@pytest.mark.parametrize("launcher", BY_NODE + BY_RANK)
def test_a_rank_that_raises_is_named_with_its_traceback_last(launcher: str, start: Start, tmp_path: Path) -> None:
    running = start(launcher)
    (tmp_path / "raise1").touch()
    code, written, _ = running.ends()
    assert code == 1
    summary = written[written.rindex("---- rank 1 failed first (host b, pid ") :]
    assert (
        "): exit code 1 ----\n" in summary
        and "ValueError: boom on 1" in summary.splitlines()[-1 - ("after it" in summary)]
    )


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_a_killed_node_launcher_ends_all(launcher: str, start: Start) -> None:
    running = start(launcher)
    [agent] = running.pids("b", "-m deepspeed.launcher.launch", "loop.py")
    os.kill(agent, signal.SIGKILL)
    code, written, _ = running.ends()
    who = "node b" if launcher == "pdsh" else "rank 1"
    assert code == 1
    assert f"---- {who} failed first (host b): lost ----\nits launcher ended without a word" in written


@pytest.mark.parametrize("launcher", BY_NODE + BY_RANK)
def test_a_cut_network_ends_all_on_both_sides(launcher: str, start: Start, nodes: Cluster, mended: None) -> None:
    running = start(launcher)
    nodes.cut("b")
    code, written, took_s = running.ends()
    who = "rank 1" if launcher in BY_RANK else "node b"
    assert code == 1
    assert f"---- {who} failed first (host b): lost ----\nno sign of life for 10 s" in written
    print(f"{launcher}: all ended {took_s:.1f} s after the cut")


def test_a_node_that_dies_ends_all(tmp_path: Path) -> None:
    """On a cluster of its own, which does not get the node back."""
    (tmp_path / "own").mkdir()
    with cluster(tmp_path / "own") as nodes:
        running = Running(nodes, tmp_path, "--launcher", "ssh")
        try:
            nodes["b"].kill()
            code, written, _ = running.ends()
        finally:
            running.close()
    assert code == 1
    assert "---- node b failed first (host b): lost ----" in written


@pytest.mark.parametrize("launcher", BY_NODE + BY_RANK)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(launcher: str, number: signal.Signals, start: Start) -> None:
    running = start(launcher)
    running.process.send_signal(number)
    code, written, _ = running.ends()
    if number == signal.SIGINT:
        assert code == 1
        assert written.endswith("---- stopped by SIGINT at the launcher; all ranks were ended ----\n")


def test_two_ranks_per_node_and_a_hang_in_one(start: Start, tmp_path: Path) -> None:
    """The watchdog names the rank that did not come, the collective and where it was called."""
    running = start("ssh", slots=2, DS_TEST_TIMEOUT_S="12")
    (tmp_path / "hang3").touch()
    code, written, _ = running.ends(60)
    assert code != 0
    assert "all_reduce has waited for" in written and "ranks 0, 1, 2 wait in all_reduce at " in written
    assert re.search(r"rank 3 has not come: it is at .*/loop.py:\d+ in <module>", written)


def _fails(nodes: Cluster, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        nodes.head.enter(*deepspeed(*arguments)),
        env=environment(**variables),
        timeout=90,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert until(lambda: not nodes.leftovers(), 15)
    return done.stderr


def test_an_unreachable_host_is_named_before_anything_starts(nodes: Cluster, mended: None) -> None:
    nodes.cut("b")
    written = _fails(nodes, "-H", nodes.hostfile(a=1, b=1), "--launcher", "ssh", "x.py")
    assert "1 of 2 hosts cannot be reached by ssh without a password:\n  b: ssh: connect to host b port 22" in written


def test_the_wrong_python_on_a_node_is_named(nodes: Cluster, tmp_path: Path) -> None:
    """A python that only the head has."""
    nodes["b"].run("mount", "-t", "tmpfs", "tmpfs", str(tmp_path))
    python = tmp_path / "python"
    try:
        python.symlink_to(os.path.realpath(sys.executable))
        done = subprocess.run(
            nodes.head.enter(str(python), *deepspeed("-H", nodes.hostfile(a=1, b=1), "--launcher", "pdsh", "x.py")[1:]),
            env={**environment(), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            timeout=90,
            capture_output=True,
            text=True,
        )
    finally:
        nodes["b"].run("umount", str(tmp_path))
    assert (
        "---- node b failed first (host b): its launcher did not start (exit code 127: command not found)"
        in done.stderr
    )
    assert "On b, this has to work:" in done.stderr


def test_a_taken_port_is_named_with_its_host(nodes: Cluster) -> None:
    listen = "import socket, time; s = socket.create_server(('', 23456)); print('up', flush=True); time.sleep(60)"
    taken = nodes["a"].start(sys.executable, "-c", listen, stdout=subprocess.PIPE)
    assert taken.stdout is not None and taken.stdout.readline() == "up\n"
    flags = ["-H", nodes.hostfile(a=1, b=1), "--launcher", "pdsh", "--master_port", "23456", "x.py"]
    try:
        done = subprocess.run(
            nodes.head.enter(*deepspeed(*flags)), env=environment(), timeout=90, capture_output=True, text=True
        )
    finally:
        for pid in nodes["a"].processes():
            os.kill(pid, signal.SIGKILL)
        taken.wait()
    assert "--master_port 23456 is taken on this machine (a)" in done.stderr


def test_different_packages_between_nodes_are_named(nodes: Cluster, tmp_path: Path) -> None:
    """Node b finds another version of torch's metadata first."""
    fake = tmp_path / "torch-9.9.dist-info"
    fake.mkdir()
    nodes["b"].run(
        "sh", "-c", f"mount -t tmpfs tmpfs {fake} && printf 'Name: torch\\nVersion: 9.9\\n' > {fake}/METADATA"
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    try:
        written = _fails(nodes, "-H", nodes.hostfile(a=1, b=1), "--launcher", "ssh", "x.py", PYTHONPATH=path)
    finally:
        nodes["b"].run("umount", str(fake))
    assert "---- node b failed first (host b): packages differ between nodes ----\ntorch is " in written
    assert "and 9.9 on b" in written

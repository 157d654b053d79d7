"""The example model, trained across two nodes by every launcher, has the losses of a run on one node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.nodes import REPOSITORY, Cluster, deepspeed, environment, why_not

EXAMPLE = REPOSITORY / "examples" / "gpt"
SMALL = "--width 32 --layers 2 --heads 2 --seq 16 --steps 6 --eval-batches 4 --sample-bytes 0".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
    return path


def _training(text: Path, run_dir: Path) -> list[str]:
    config = str(EXAMPLE / "zero2.json")
    own = ["--deepspeed_config", config, "--data", str(text), "--run-dir", str(run_dir)]
    return [str(EXAMPLE / "train.py"), *SMALL, *own]


def _losses(run_dir: Path) -> Any:
    return json.loads((run_dir / "losses.json").read_text())


@pytest.fixture(scope="module")
def one_node(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run_dir = tmp_path_factory.mktemp("one")
    command = deepspeed("--num_gpus", "2", *_training(text, run_dir))
    subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True, cwd=REPOSITORY)
    return _losses(run_dir)


@pytest.mark.parametrize("launcher", ["pdsh", "ssh", "openmpi", "mpich", "slurm"])
def test_two_nodes_train_like_one(
    launcher: str, nodes: Cluster, one_node: Any, text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    program = {"openmpi": "mpirun.openmpi", "mpich": "mpirun.mpich", "slurm": "srun"}.get(launcher, launcher)
    if why_not(program):
        pytest.skip(why_not(program) or "")
    variables = request.getfixturevalue("slurm_variables") if launcher == "slurm" else {}
    flags = ["-H", nodes.hostfile(a=1, b=1), "--launcher", launcher]
    done = subprocess.run(
        nodes.head.enter(*deepspeed(*flags, *_training(text, tmp_path))),
        env=environment(**variables),
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert _losses(tmp_path) == one_node
    assert nodes.leftovers() == {}


def test_nodes_started_by_hand_train_like_one(nodes: Cluster, one_node: Any, text: Path, tmp_path: Path) -> None:
    flags = ["-H", nodes.hostfile(a=1, b=1), "--no_ssh", "--master_addr", nodes["a"].address]
    started = [
        nodes[name].start(
            *deepspeed(*flags, "--node_rank", str(rank), *_training(text, tmp_path)),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, name in reversed(list(enumerate("ab")))
    ]
    written = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], written
    assert _losses(tmp_path) == one_node
    assert nodes.leftovers() == {}


def test_intel_mpis_command_runs_under_the_hydra_it_is_built_on(nodes: Cluster, tmp_path: Path) -> None:
    """Intel MPI itself cannot be had here; MPICH's mpirun, found under its name, understands the same flags."""
    if why_not("mpirun.mpich"):
        pytest.skip(why_not("mpirun.mpich") or "")
    script = tmp_path / "report.py"
    script.write_text("import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['I_MPI_PIN'])")
    fake = tmp_path / "mpirun"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo "Intel(R) MPI Library"\nexec mpirun.mpich "$@"\n')
    fake.chmod(0o755)
    flags = ["-H", nodes.hostfile(a=1, b=1), "--launcher", "impi", "-q", str(script)]
    environ = environment()
    environ = {**environ, "PATH": f"{tmp_path}:{environ['PATH']}"}
    done = subprocess.run(nodes.head.enter(*deepspeed(*flags)), env=environ, timeout=60, capture_output=True, text=True)
    assert sorted(done.stdout.splitlines()) == ["0 2 0", "1 2 0"], done.stderr


def test_the_python_that_runs_the_tests_is_the_one_on_the_nodes(nodes: Cluster) -> None:
    assert nodes["a"].run(sys.executable, "-c", "import socket; print(socket.gethostname())").stdout == "a\n"

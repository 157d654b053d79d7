"""Starting, adopting and refusing; `deepspeed.comm` as a stand-in for torch.distributed."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspeed import comm
from deepspeed.comm import init as module
from deepspeed.utils.errors import DeepSpeedError
from tests.engine.runs import LONG
from tests.harness import free_port, run_alone, run_ranks

FIVE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _leave() -> None:
    dist.destroy_process_group()
    for name in FIVE:
        os.environ.pop(name, None)


def _alone(**kwargs: Any) -> list[Any]:
    comm.init_distributed(**kwargs)
    comm.init_distributed(**kwargs)
    seen = [comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), dist.get_backend(), comm.is_initialized()]
    seen.append(sorted(name for name in FIVE if name in os.environ))
    _leave()
    return seen


@pytest.mark.parametrize("kwargs", [{}, {"dist_backend": "gloo", "auto_mpi_discovery": False, "unheard_of": 1}])
def test_one_process_needs_no_launcher_and_no_mpi(kwargs: dict[str, Any]) -> None:
    assert run_alone(_alone, **kwargs) == [0, 1, 0, "gloo", True, sorted(FIVE)]


def _alone_beside(port: int) -> int:
    comm.init_distributed(distributed_port=port)
    chosen = int(os.environ["MASTER_PORT"])
    _leave()
    return chosen


def test_one_process_starts_although_the_default_port_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_alone(_alone_beside, port) != port


ONE_PROCESS = """
import deepspeed, torch
deepspeed.init_distributed("gloo")
total = torch.ones(1)
deepspeed.comm.all_reduce(total)
print("joined", total.item(), flush=True)
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--standalone"],
        pytest.param(["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"], marks=LONG),
        pytest.param([], marks=LONG),
    ],
)
def test_torchrun_with_one_process_joins_the_store_of_its_agent(options: list[str], tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(ONE_PROCESS)
    options = options or ["--master_port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc_per_node", "1", str(script)]
    environ = {name: value for name, value in os.environ.items() if name not in FIVE} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environ)
    assert "joined 1.0" in done.stdout, done.stderr


def _by_arguments(port: int) -> int:
    comm.init_distributed("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1, timeout=timedelta(60))
    world_size = comm.get_world_size()
    assert "RANK" not in os.environ
    dist.destroy_process_group()
    return world_size


THREADS_LEFT = """
import os, sys
import torch.distributed as dist
from deepspeed import comm
comm.init_distributed("gloo")
assert "torch._dynamo" not in sys.modules
import torch._dynamo
dist.destroy_process_group()
tasks = f"/proc/{os.getpid()}/task"
print([name for name in (open(f"{tasks}/{task}/comm").read().strip() for task in os.listdir(tasks)) if "gloo" in name])
"""


def test_no_thread_of_a_destroyed_group_is_left_to_abort_the_end_of_the_process() -> None:
    environ = {name: value for name, value in os.environ.items() if name not in FIVE}
    command = [sys.executable, "-c", THREADS_LEFT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_arguments_win_over_the_environment() -> None:
    assert run_alone(_by_arguments, free_port()) == 1


def _adopt(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    comm.init_distributed(dist_backend="nccl", dist_init_required=False)
    assert comm.get_world_group() is group


def test_a_started_process_group_is_adopted_as_it_is() -> None:
    run_ranks(2, _adopt)


def test_nothing_to_adopt_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        DeepSpeedError, match=r"dist_init_required=False, but .*not initialized(.|\n)*init_process_group"
    ):
        comm.init_distributed(dist_init_required=False)
    with pytest.raises(AssertionError):
        comm.init_distributed(dist_init_required=False)


def test_half_set_variables_stop_before_any_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DeepSpeedError, match="WORLD_SIZE is not set"):
        comm.init_distributed()


def test_the_timeout_comes_from_the_environment_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.default_timeout() == timedelta(minutes=10)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "45")
    assert module.default_timeout() == timedelta(minutes=45)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "soon")
    with pytest.raises(DeepSpeedError, match="DEEPSPEED_TIMEOUT='soon' is not a whole number"):
        module.default_timeout()


def test_mpi_discovery_writes_the_five_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FIVE:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in (("RANK", "0"), ("SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    comm.mpi_discovery(distributed_port=4321)
    assert [os.environ[name] for name in FIVE] == ["0", "2", "0", "127.0.0.1", "4321"]


def test_the_signature_of_init_distributed_is_the_promised_one() -> None:
    promised = (
        "dist_backend auto_mpi_discovery distributed_port verbose timeout init_method dist_init_required config rank "
        "world_size kwargs"
    )
    assert " ".join(inspect.signature(comm.init_distributed).parameters) == promised


def _groups(rank: int, world_size: int) -> None:
    group = comm.new_group([1])
    assert comm.get_all_ranks_from_group() == [0, 1]
    assert comm.get_global_rank(None, 1) == 1
    if rank == 1:
        assert comm.get_global_rank(group, 0) == 1
        assert comm.get_all_ranks_from_group(group) == [1]
        comm.destroy_process_group(group)
    mesh = comm.initialize_mesh_device((2,), ("dp",))
    assert (mesh.mesh_dim_names, mesh.size()) == (("dp",), 2)


def test_groups_and_meshes_translate_ranks() -> None:
    run_ranks(2, _groups)


def test_other_names_are_those_of_torch_distributed() -> None:
    assert comm.get_backend is dist.get_backend
    assert (comm.ReduceOp, comm.P2POp, comm.ProcessGroup) == (dist.ReduceOp, dist.P2POp, dist.ProcessGroup)
    assert torch.distributed.is_available() is comm.is_available()
    with pytest.raises(AttributeError):
        _ = comm.no_such_name

"""Workers of a job, as text; cores for ranks."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from deepspeed.launcher.binding import numa_nodes, numactl_command, parse_cores, physical_cores, slice_of
from deepspeed.launcher.job import Job, Worker, workers
from deepspeed.utils.errors import DeepSpeedError

WORLD = {"a": [0, 1], "b": [4, 5, 6]}


def _workers(
    environ: dict[str, str] | None = None, numa: dict[int, list[int]] | None = None, **fields: Any
) -> list[Worker]:
    job = Job(**{"world": WORLD, "master_addr": "a", "master_port": 1234, "script": "train.py", **fields})
    return workers(job, environ or {}, numa=numa, now=datetime(2030, 1, 2, 3, 4, 5))


@pytest.mark.parametrize(
    ("name", "node0", "node1"),
    [
        ("RANK", "0 1", "2 3 4"),
        ("LOCAL_RANK", "0 1", "0 1 2"),
        ("WORLD_SIZE", "5 5", "5 5 5"),
        ("LOCAL_SIZE", "2 2", "3 3 3"),
        ("LOCAL_WORLD_SIZE", "2 2", "3 3 3"),
        ("CROSS_RANK", "0 0", "1 1 1"),
        ("CROSS_SIZE", "2 2", "2 2 2"),
        ("MASTER_ADDR", "a a", "a a a"),
        ("MASTER_PORT", "1234 1234", "1234 1234 1234"),
        ("CUDA_VISIBLE_DEVICES", "0,1 0,1", "4,5,6 4,5,6 4,5,6"),
    ],
)
def test_the_environment_table_holds_on_every_node(name: str, node0: str, node1: str) -> None:
    for node_rank, expected in enumerate((node0, node1)):
        assert " ".join(worker.environ[name] for worker in _workers(node_rank=node_rank)) == expected


def test_the_callers_environment_comes_first_and_is_kept() -> None:
    environ = _workers({"HOME": "/h", "RANK": "9"})[0].environ
    assert (environ["HOME"], environ["RANK"]) == ("/h", "0")


def test_no_visible_devices_variable_where_the_platform_has_none() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in _workers(visible_devices=None)[0].environ


@pytest.mark.parametrize(
    ("fields", "command"),
    [
        ({}, "PYTHON -u train.py --local_rank=1 --x 1"),
        ({"no_local_rank": True}, "PYTHON -u train.py --x 1"),
        ({"module": True}, "PYTHON -u -m train.py --local_rank=1 --x 1"),
        ({"no_python": True}, "train.py --local_rank=1 --x 1"),
    ],
)
def test_the_command_puts_the_local_rank_before_the_users_arguments(fields: dict[str, Any], command: str) -> None:
    worker = _workers(script_args=["--x", "1"], **fields)[1]
    assert " ".join(worker.command).replace(sys.executable, "PYTHON") == command


def test_arguments_are_passed_verbatim() -> None:
    args = ["--a b", "$HOME", "", "--", '"q"', "--num_gpus"]
    assert _workers(script_args=args)[0].command[-6:] == args


def test_each_rank_has_a_log_named_by_time_and_rank() -> None:
    names = [worker.log for worker in _workers(node_rank=1, log_dir=Path("logs"))]
    assert names == [Path(f"logs/20300102030405_rank{rank}.log") for rank in (2, 3, 4)]


def test_bound_ranks_get_equal_slices_of_the_cores() -> None:
    bound = _workers(node_rank=1, bind_cores=[0, 1, 2, 8, 9, 10, 11], numa={0: [0, 1, 2, 3], 1: [8, 9, 10, 11]})
    assert [" ".join(worker.command[:5]).partition(sys.executable)[0].strip() for worker in bound] == [
        "numactl -m 0 -C 0-1",
        "numactl -C 2,8",
        "numactl -m 1 -C 9-10",
    ]
    assert {worker.environ["OMP_NUM_THREADS"] for worker in bound} == {"2"}


def test_threads_are_shared_out_unless_the_caller_said_how_many() -> None:
    assert _workers(threads_per_rank=3)[0].environ["OMP_NUM_THREADS"] == "3"
    assert _workers({"OMP_NUM_THREADS": "7"}, threads_per_rank=3)[0].environ["OMP_NUM_THREADS"] == "7"
    assert "OMP_NUM_THREADS" not in _workers()[0].environ


def test_core_lists_are_numbers_and_ranges() -> None:
    assert parse_cores("1,3-5,7") == [1, 3, 4, 5, 7]
    for text in ("", "a", "3-1", "1-", "1,,2"):
        with pytest.raises(DeepSpeedError, match="neither a core nor a range"):
            parse_cores(text)
    with pytest.raises(DeepSpeedError, match="has a core twice"):
        parse_cores("1-3,2")


def test_fewer_cores_than_ranks_is_refused() -> None:
    with pytest.raises(DeepSpeedError, match=r"2 cores are too few for 3 ranks"):
        slice_of([0, 1], 0, 3)


def test_numactl_names_single_cores_and_runs() -> None:
    assert " ".join(numactl_command([7, 1, 2, 3, 5], {})) == "numactl -C 1-3,5,7"


def test_the_machines_cores_and_nodes_are_read_from_sysfs(tmp_path: Path) -> None:
    """A machine that numbers the cores of its two NUMA nodes in turn; and a container with a part of it."""
    for core, siblings in enumerate(("0,4", "1,5", "2,6", "3,7") * 2):
        (tmp_path / f"cpu/cpu{core}/topology").mkdir(parents=True)
        (tmp_path / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(siblings + "\n")
    for node, cores in enumerate(("0,2,4,6", "1,3,5,7", "")):
        (tmp_path / f"node/node{node}").mkdir(parents=True)
        (tmp_path / f"node/node{node}/cpulist").write_text(cores + "\n")
    assert physical_cores(range(8), tmp_path) == [0, 2, 1, 3]
    assert physical_cores([3, 4, 6, 7], tmp_path) == [4, 6, 3]
    assert numa_nodes(tmp_path) == {0: [0, 2, 4, 6], 1: [1, 3, 5, 7]}

"""The recommender and the vision-language toy train at ZeRO stages 2 and 3 alike, and under AzureML's environments."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import DISTRIBUTED_ENV, free_port, run_ranks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {
    "recsys": "--steps 40 --users 400 --items 200 --width 8".split(),
    "multimodal": "--steps 25 --width 32".split(),
}


def run_example(rank: int, world_size: int, name: str, stage: int) -> list[float]:
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / name / "train.py")
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = str(EXAMPLES / name / f"zero{stage}.json")
    return module.main([*SMALL[name], "--deepspeed_config", config])


@pytest.mark.parametrize("name", SMALL)
def test_an_application_learns_the_same_at_zero_2_and_3(name: str) -> None:
    two, three = (run_ranks(2, run_example, name, stage)[0] for stage in (2, 3))
    assert sum(two[-5:]) < sum(two[:5]) - (0.05 if name == "recsys" else 5)
    assert three == pytest.approx(two, rel=1e-3)


def azure_mpi(rank: int, port: int) -> dict[str, str]:
    """Two machines of one GPU each."""
    return {
        "AZUREML_EXPERIMENT_ID": "00000000-0000-0000-0000-000000000000",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
        "AZ_BATCH_MASTER_NODE": f"127.0.0.1:{port}",
    }


def azure_mpi_one_machine(rank: int, port: int) -> dict[str, str]:
    """One machine of two GPUs: Azure names no master there."""
    return {
        "AZUREML_EXPERIMENT_ID": "00000000-0000-0000-0000-000000000000",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "MASTER_PORT": str(port),
    }


def azure_pytorch(rank: int, port: int) -> dict[str, str]:
    """What `distribution: pytorch` sets."""
    return {
        "AZUREML_EXPERIMENT_ID": "00000000-0000-0000-0000-000000000000",
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.quick("azure_mpi")
@pytest.mark.parametrize("kind", [azure_mpi, azure_mpi_one_machine, azure_pytorch])
def test_an_example_runs_in_azureml_s_environment(kind: Any) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED_ENV}
    root = str(EXAMPLES.parent)
    command = [sys.executable, str(EXAMPLES / "recsys" / "train.py"), "--steps", "3", "--users", "50", "--items", "20"]
    port = free_port()
    common = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "PYTHONPATH": root}
    started = [
        subprocess.Popen(command, env={**clean, **common, **kind(rank, port)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0]
    assert "loss 0." in outputs[0] and not outputs[1].strip()


@pytest.mark.parametrize("kind", ["mpi", "pytorch"])
def test_the_job_files_start_plain_python_in_that_distribution(kind: str) -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((EXAMPLES / "azureml" / f"job_{kind}.yml").read_text())
    assert job["distribution"] == {"type": kind, "process_count_per_instance": 8}
    assert job["type"] == "command" and "&& python examples/" in job["command"]
    script = EXAMPLES.parent / job["command"].split("python ")[1].split()[0]
    assert script.is_file()


def test_every_example_has_a_page_of_at_most_a_few_lines() -> None:
    for folder in ("hf_trainer", "lightning", "peft_lora", "recsys", "multimodal", "azureml"):
        lines = (EXAMPLES / folder / "README.md").read_text().splitlines()
        assert 3 <= sum(bool(line) for line in lines) <= 6, folder

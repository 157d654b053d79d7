"""Each launcher's variables, as text: "rank/world local/local_size address:port source"."""

from __future__ import annotations

import json
import socket

import pytest

from deepspeed.utils.errors import DeepSpeedError
from deepspeed.utils.launch_env import LaunchEnv, discover, expand_hosts

OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_JOB_ID": "123456",
}
SAGEMAKER = {"SM_TRAINING_ENV": json.dumps({"hosts": ["algo-1", "algo-2"]})}
MASTER = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}


def _text(env: LaunchEnv) -> str:
    return (
        f"{env.rank}/{env.world_size} {env.local_rank}/{env.local_size} "
        f"{env.master_addr}:{env.master_port} {env.source}"
    )


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MASTER},
            "1/4 1/2 head:1234 torchrun",
        ),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MASTER},
            "3/4 1/2 head:1234 torchrun",
        ),
        ({**OMPI, **MASTER}, "3/8 1/2 head:1234 Open MPI"),
        ({**OMPI, "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "3/4 1/4 127.0.0.1:29500 Open MPI"),
        (
            {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"},
            "2/3 2/3 127.0.0.1:29500 MPICH or Intel MPI",
        ),
        (
            {"PMIX_RANK": "1", "WORLD_SIZE": "2", "PALS_LOCAL_RANKID": "0", **MASTER},
            "1/2 0/2 head:1234 MPICH or Intel MPI",
        ),
        (
            {
                f"MV2_COMM_WORLD_{name}": n
                for name, n in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))
            },
            "1/2 1/2 127.0.0.1:29500 MVAPICH",
        ),
        (SLURM, "5/7 1/3 gpu08:23456 Slurm"),
        ({**SLURM, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}, "0/2 0/2 head:1234 torchrun"),
        (
            {**OMPI, "AZUREML_EXPERIMENT_ID": "x", "AZ_BATCH_MASTER_NODE": "10.0.0.4:6105"},
            "3/8 1/2 10.0.0.4:6105 AzureML",
        ),
        (
            {**OMPI, "AZUREML_EXPERIMENT_ID": "x", "AZ_BATCHAI_MPI_MASTER_NODE": "10.0.0.4"},
            "3/8 1/2 10.0.0.4:29500 AzureML",
        ),
        ({**OMPI, "AZUREML_EXPERIMENT_ID": "x", "DLTS_JOB_ID": "y", **MASTER}, "3/8 1/2 head:1234 Open MPI"),
        ({**OMPI, **SAGEMAKER}, "3/8 1/2 algo-1:29500 SageMaker"),
        ({"MASTER_PORT": "47777"}, "0/1 0/1 127.0.0.1:47777 one process, no launcher"),
        ({"WORLD_SIZE": "1", "MASTER_PORT": "47777"}, "0/1 0/1 127.0.0.1:47777 one process, no launcher"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "47777"}, "0/1 0/1 127.0.0.1:47777 torchrun"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_launcher_is_recognised_by_its_variables(environ: dict[str, str], expected: str) -> None:
    assert _text(discover(environ)) == expected


def test_an_empty_environment_is_one_process_on_a_free_port() -> None:
    env = discover({})
    assert (env.rank, env.world_size, env.local_rank, env.master_addr) == (0, 1, 0, "127.0.0.1")
    assert 1024 <= env.master_port < 65536


def test_one_process_evades_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = discover({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port)})
        assert env.master_port != port
        assert discover({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}).master_port == 1234


def test_one_process_under_torchrun_goes_to_the_port_where_the_agent_keeps_the_store() -> None:
    with socket.socket() as agent:
        agent.bind(("", 0))
        agent.listen()
        port = agent.getsockname()[1]
        environ = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        assert discover({**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"}).master_port == port
        assert discover({**environ, "TORCHELASTIC_USE_AGENT_STORE": "False"}).master_port != port


def test_an_agent_store_that_cannot_be_found_is_an_error_and_not_a_wait() -> None:
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(DeepSpeedError, match="^RANK is not set"):
        discover(agent)
    with pytest.raises(DeepSpeedError, match="^MASTER_ADDR, MASTER_PORT are not set"):
        discover({**agent, "RANK": "0", "WORLD_SIZE": "1"})


def test_a_slurm_allocation_without_srun_is_one_process() -> None:
    inside_sbatch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert discover(inside_sbatch).world_size == 1


def test_other_launchers_can_be_left_out() -> None:
    assert discover(SLURM, other_launchers=False).world_size == 1


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0"}, r"^WORLD_SIZE is not set, although other variables of torchrun are \(RANK=0\)"),
        ({"WORLD_SIZE": "2"}, r"^RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, r"^MASTER_ADDR, MASTER_PORT are not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTER}, r"^LOCAL_RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, r"RANK='x' is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MASTER}, r"rank 2 is not in a world of 2 .*torchrun"),
        ({**SLURM, "SLURM_LOCALID": "5"}, r"local rank 5 is not in a world of 3 .*Slurm"),
        (OMPI, r"MASTER_ADDR is not set, and Open MPI's 8 processes may be on several nodes \(2 on this one\)"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, r"OMPI_COMM_WORLD_SIZE is not set"),
        ({**OMPI, "AZUREML_EXPERIMENT_ID": "x"}, r"AZ_BATCH_MASTER_NODE is not set"),
        ({**OMPI, "SM_TRAINING_ENV": "["}, r"SM_TRAINING_ENV is not a JSON object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_half_set_variables_are_named(environ: dict[str, str], words: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        discover(environ)


def test_apply_writes_the_five_variables() -> None:
    environ: dict[str, str] = {}
    discover({**OMPI, **MASTER}).apply(environ)
    assert environ == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}


def test_what_apply_writes_is_read_back() -> None:
    environ: dict[str, str] = {}
    discover(SLURM).apply(environ)
    assert _text(discover(environ)) == "5/7 1/7 gpu08:23456 torchrun"


@pytest.mark.parametrize(
    ("hosts", "expanded"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("n[01-03,7],login", "n01 n02 n03 n7 login"),
        ("rack[1-2]-n[08-10]", "rack1-n08 rack1-n09 rack1-n10 rack2-n08 rack2-n09 rack2-n10"),
        ("a[1]b", "a1b"),
    ],
)
def test_slurm_host_lists_expand_in_order(hosts: str, expanded: str) -> None:
    assert " ".join(expand_hosts(hosts)) == expanded

"""The command line: what runs where, ports, and each thing that is refused."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deepspeed.accelerator.platforms import PLATFORMS
from deepspeed.launcher import agent, arguments, launch, runner
from deepspeed.launcher.hostfile import encode_world
from deepspeed.launcher.job import Job
from deepspeed.utils.errors import DeepSpeedError, NotAvailableError
from tests.harness import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
REPORT = """
import json, os, sys
names = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
with open(os.path.join(os.environ["REPORTS"], os.environ["RANK"]), "w") as file:
    json.dump([[os.environ[name] for name in names], sys.argv[1:]], file)
"""


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that reports its place in the world and its arguments."""
    path = tmp_path / "report.py"
    path.write_text(REPORT)
    (tmp_path / "reports").mkdir()
    monkeypatch.setenv("REPORTS", str(tmp_path / "reports"))
    return path


def _reports(script: Path) -> list[Any]:
    return [json.loads(file.read_text()) for file in sorted((script.parent / "reports").iterdir())]


def _job(*flags: str, environ: dict[str, str] | None = None) -> Job:
    return runner.make_job(runner.parse_args([*flags, "train.py"]), os.environ if environ is None else environ)


def _world(*flags: str, platform: str = "cpu", **environ: str) -> str:
    world = runner.find_world(runner.parse_args([*flags, "train.py"]), environ, PLATFORMS[platform])
    return " ".join(f"{host}:{','.join(map(str, slots))}" for host, slots in world.items())


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=3\n")
    return str(path)


def test_ranks_start_with_their_environment_and_their_arguments_verbatim(script: Path) -> None:
    port = free_port()
    args = ["--x", "a b", "--num_gpus", "9", "$HOME", ""]
    assert runner.main(["--num_gpus", "2", "--master_port", str(port), "-q", str(script), *args]) == 0
    assert _reports(script) == [
        [[str(rank), str(rank), "2", "127.0.0.1", str(port)], [f"--local_rank={rank}", *args]] for rank in range(2)
    ]


def test_the_runner_is_a_module_and_a_script_may_be_one(script: Path) -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "--module"]
    environ = {**os.environ, "PYTHONPATH": f"{script.parent}{os.pathsep}{REPOSITORY}"}
    done = subprocess.run([*command, "--no_local_rank", "report", "x"], env=environ, timeout=60, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")
    assert [report[1] for report in _reports(script)] == [["x"]]


def test_a_nodes_launcher_starts_its_own_ranks_only(script: Path) -> None:
    world = encode_world({"a": [0], "b": [0, 1]})
    flags = [f"--world_info={world}", "--node_rank=1", "--master_addr=a", "--master_port=1234", "-q"]
    assert launch.main([*flags, str(script)]) == 0
    assert [report[0] for report in _reports(script)] == [["1", "0", "3", "a", "1234"], ["2", "1", "3", "a", "1234"]]


def test_without_arguments_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([]) == 0
    assert "usage: deepspeed" in capsys.readouterr().out


def test_the_command_imports_no_torch() -> None:
    code = "import sys, deepspeed.launcher.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60).returncode == 0


def test_a_failing_script_fails_the_command(script: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script.write_text("raise SystemExit(5)")
    assert runner.main(["--num_gpus", "1", str(script)]) == 5
    assert capfd.readouterr().err.rstrip().endswith("rank 0: exit code 5")


def test_the_command_prints_what_is_wrong_with_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["deepspeed", "--num_nodes", "2", "train.py"])
    assert runner.main() == 2
    assert capsys.readouterr().err.startswith("deepspeed: --num_nodes 2 needs a hostfile")


@pytest.mark.parametrize(
    ("flags", "platform", "environ", "world"),
    [
        ([], "cpu", {"LOCAL_SIZE": "3"}, "localhost:0,1,2"),
        (["--num_gpus", "4"], "cpu", {}, "localhost:0,1,2,3"),
        (["--include", "localhost:1"], "cpu", {"LOCAL_SIZE": "2"}, "localhost:1"),
        (["--exclude", "localhost:1"], "cpu", {"LOCAL_SIZE": "3"}, "localhost:0,2"),
        ([], "cuda", {"CUDA_VISIBLE_DEVICES": "1,3"}, "localhost:1,3"),
        (["--num_gpus", "2"], "cuda", {"CUDA_VISIBLE_DEVICES": "1,3"}, "localhost:0,1"),
        ([], "xpu", {"ZE_AFFINITY_MASK": "2"}, "localhost:2"),
        ([], "cpu", {"CUDA_VISIBLE_DEVICES": "1,3", "LOCAL_SIZE": "1"}, "localhost:0"),
        (["--num_gpus", "2"], "cuda", {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}, "localhost:0,1"),
    ],
)
def test_one_machines_slots(flags: list[str], platform: str, environ: dict[str, str], world: str) -> None:
    assert _world(*flags, platform=platform, **environ) == world


def test_a_list_of_visible_devices_is_taken_out_of_the_environment() -> None:
    args = runner.parse_args(["train.py"])
    environ = {"CUDA_VISIBLE_DEVICES": "1,3"}
    runner.find_world(args, environ, PLATFORMS["cuda"])
    assert environ == {}


def test_visible_devices_that_are_no_indices_stay_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    environ = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}
    assert _job("--num_gpus", "2", environ=environ).visible_devices is None
    assert _job("--num_gpus", "2", environ={"DS_ACCELERATOR": "cuda"}).visible_devices == "CUDA_VISIBLE_DEVICES"


def test_hostfile_slots_are_filtered_and_counted(hosts: str) -> None:
    assert _world("-H", hosts) == "a:0,1 b:0,1,2"
    assert _world("-H", hosts, "-i", "b:2@a") == "a:0,1 b:2"
    assert _world("-H", hosts, "--num_nodes", "1") == "a:0,1"
    assert _world("-H", hosts, "--num_gpus", "1") == "a:0 b:0"


def test_no_ssh_makes_this_nodes_part_of_the_job(hosts: str) -> None:
    job = _job("-H", hosts, "--no_ssh", "--node_rank", "1", "--master_addr", "a", "--master_port", "1234")
    assert (job.host, job.first_rank, job.local_size, job.world_size) == ("b", 2, 3, 5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_gpus", "2", "--include", "localhost:0"], "--num_nodes and --num_gpus do not go with --include"),
        (["--num_nodes", "2"], "--num_nodes 2 needs a hostfile, and there is none at /job/hostfile"),
        (["--num_gpus", "0"], "--num_gpus 0 starts nothing"),
        (["--node_rank", "1"], "--node_rank 1 only goes with --no_ssh"),
        (["--no_ssh", "--node_rank", "1"], r"--node_rank 1 is not in \[0, 1\)"),
        (["--master_port", "70000"], "--master_port 70000 is no TCP port"),
        (["--include", "localhost:99"], "localhost has no slot 99"),
        (["--include", "localhost:0", "--exclude", "localhost:0"], "exclude each other"),
        (["--module", "--no_python", "--num_gpus", "1"], "--module and --no_python exclude each other"),
        (["--elastic_training"], "--elastic_training needs --master_addr"),
        (["--elastic_training", "--master_addr", "a", "--no_local_rank"], "does not go with --no_local_rank"),
        (["-H", "HOSTS", "--no_ssh"], "--no_ssh with several hosts needs --master_addr"),
        (["-H", "HOSTS", "--no_ssh", "--master_addr", "a"], "--no_ssh with several hosts needs --node_rank"),
        (["--num_gpus", "1000000000"], "--num_gpus 1000000000 is more than 4096"),
        (["--grace_period", "-1"], "--grace_period -1 is no time"),
        (["--start_timeout", "nan"], "--start_timeout nan is no time"),
        (["--launcher_args", "'x"], '--launcher_args "\'x" is not a command line: No closing quotation'),
    ],
)
def test_contradictions_are_refused_with_the_cure(flags: list[str], words: str, hosts: str) -> None:
    with pytest.raises(DeepSpeedError, match=words):
        _job(*[hosts if flag == "HOSTS" else flag for flag in flags])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--launcher", "carrier-pigeon"], "--launcher carrier-pigeon is not known.\n  Use one of pdsh, ssh, openmpi"),
    ],
)
def test_what_is_not_there_yet_says_so(flags: list[str], words: str, hosts: str) -> None:
    arguments = [hosts if flag == "HOSTS" else flag for flag in flags]
    with pytest.raises(NotAvailableError, match=words):
        runner.main([*arguments, "train.py"])


def test_launcher_names_are_not_case_sensitive() -> None:
    assert runner.parse_args(["--launcher", "SLURM", "train.py"]).launcher == "SLURM"


def test_the_default_port_gives_way_to_a_free_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(agent, "DEFAULT_PORT", port)
        with agent.meeting_port(None, may_choose=True) as chosen:
            assert chosen != port


def test_a_port_asked_for_is_never_replaced() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(DeepSpeedError, match=f"--master_port {port} is taken"),
            agent.meeting_port(port, may_choose=True),
        ):
            pass
    with agent.meeting_port(port, may_choose=True) as chosen:
        assert chosen == port


def test_two_commands_at_once_get_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "DEFAULT_PORT", free_port())
    with agent.meeting_port(None, may_choose=True) as one, agent.meeting_port(None, may_choose=True) as other:
        assert one == agent.DEFAULT_PORT
        assert one != other


def test_a_kept_port_can_be_listened_on_by_rank_0() -> None:
    from torch.distributed import TCPStore

    with agent.meeting_port(None, may_choose=True) as port:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.set("key", "value")
        assert store.get("key") == b"value"


def test_a_log_folder_must_not_be_a_file(script: Path) -> None:
    with pytest.raises(DeepSpeedError, match=r"--enable_each_rank_log .*report\.py is a file"):
        runner.main(["--num_gpus", "1", "--enable_each_rank_log", str(script), str(script)])


def test_each_rank_may_have_its_own_log(script: Path, tmp_path: Path) -> None:
    script.write_text("import os; print('I am', os.environ['RANK'])")
    logs = tmp_path / "made" / "logs"
    assert runner.main(["--num_gpus", "2", "--enable_each_rank_log", str(logs), "-q", str(script)]) == 0
    assert sorted(file.read_text() for file in logs.glob("*_rank?.log")) == ["I am 0\n", "I am 1\n"]
    with pytest.raises(
        DeepSpeedError, match=r"--enable_each_rank_log .*report\.py/logs cannot be made: Not a directory"
    ):
        runner.main(["--num_gpus", "1", "--enable_each_rank_log", f"{script}/logs", str(script)])


def test_binding_cores_needs_numactl_and_no_other_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    with pytest.raises(DeepSpeedError, match="needs numactl, which is not installed"):
        _job("--num_gpus", "1", "--bind_cores_to_rank")
    monkeypatch.setattr(launch.shutil, "which", lambda name: "/usr/bin/numactl")
    monkeypatch.setattr(launch.binding, "allowed_cores", lambda: {0, 1, 2, 3})
    assert _job("--num_gpus", "1", "--bind_cores_to_rank", "--bind_core_list", "0,2-3").bind_cores == [0, 2, 3]
    with pytest.raises(DeepSpeedError, match=r"has no core 4 for this process\.\n  It may use 0-3\."):
        _job("--num_gpus", "1", "--bind_cores_to_rank", "--bind_core_list", "0,2-5")
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    with pytest.raises(DeepSpeedError, match="KMP_AFFINITY=compact: both bind threads"):
        _job("--num_gpus", "1", "--bind_cores_to_rank")


def test_a_single_host_that_is_elsewhere_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "run_here", lambda *args, **more: 0)
    monkeypatch.setattr(runner.logger, "propagate", True)
    for host, is_told in (("localhost", False), ("203.0.113.7", True)):
        (tmp_path / "hosts").write_text(f"{host} slots=1\n")
        caplog.clear()
        assert runner.run(runner.parse_args(["-H", str(tmp_path / "hosts"), "train.py"])) == 0
        assert ("is not this machine, but its ranks run here; --force_multi" in caplog.text) == is_told


def test_ranks_on_the_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.binding, "allowed_cores", lambda: set(range(8)))
    assert _job("--num_gpus", "2").threads_per_rank == 4
    assert _job("--num_gpus", "1").threads_per_rank is None


def test_a_launchers_id_file_that_exists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "77.deepspeed").touch()
    with pytest.raises(DeepSpeedError, match=r"--save_pid: .*77.deepspeed exists already"), launch.pid_file(77):
        pass


def test_world_info_is_required_by_a_nodes_launcher() -> None:
    with pytest.raises(DeepSpeedError, match="--world_info is missing"):
        launch.main(["train.py"])
    with pytest.raises(DeepSpeedError, match=r"--node_rank 3 is not in \[0, 1\)"):
        launch.main([f"--world_info={encode_world({'a': [0]})}", "--node_rank", "3", "train.py"])


@pytest.mark.parametrize("world", [{}, {"a": []}, {"a": "01"}, {"a": 1}, ["a"], {"a": ["x"]}])
def test_a_world_without_slots_is_none(world: object) -> None:
    text = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    with pytest.raises(DeepSpeedError, match="is not a world"):
        launch.main([f"--world_info={text}", "train.py"])


def test_every_documented_flag_is_accepted() -> None:
    text = (
        "--hostfile h --include a --exclude b --num_nodes 1 --num_gpus 1 --num_accelerators 1 --master_port 1 "
        "--master_addr a --node_rank 0 --launcher pdsh --launcher_args=-x --module --no_python --no_local_rank --no_ssh "
        "--no_ssh_check --force_multi --save_pid --enable_each_rank_log d --autotuning run --bind_cores_to_rank "
        "--bind_core_list 1 --ssh_port 22 --venv_script v --log_level debug --quiet --elastic_training "
        "--min_elastic_nodes 1 --max_elastic_nodes 2 -H h -i a -e b -q"
    )
    parsed = arguments.make_parser().parse_args([*text.split(), "train.py", "--own", "flag"])
    assert parsed.user_args == ["--own", "flag"]


def test_the_environment_files_name_is_what_accelerate_imports() -> None:
    assert os.environ.get("DS_ENV_FILE", ".deepspeed_env") == runner.DEEPSPEED_ENVIRONMENT_NAME

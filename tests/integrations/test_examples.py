"""The examples that need these libraries run as their pages say, in a small size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.harness import DISTRIBUTED_ENV, free_port

pytestmark = pytest.mark.timeout(300)  # a launcher with two ranks of the Trainer: 13 s alone, 100 where others work

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = Path(sys.executable).parent
TRAINER = "--max_steps 4 --logging_steps 1 --learning_rate 3e-3 --use_cpu --report_to none --save_strategy no --width 32".split()


def run(command: list[str], **env: str) -> str:
    """What a command prints; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED_ENV}
    common = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, env={**clean, **common, **env}, capture_output=True, text=True, timeout=270, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def deepspeed(config: Path) -> list[str]:
    """Our launcher."""
    return [
        *(str(SCRIPTS / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())),
        *(str(EXAMPLES / "hf_trainer" / "train.py"), "--deepspeed", str(config)),
    ]


def torchrun(config: Path) -> list[str]:
    """PyTorch's."""
    return [
        *(str(SCRIPTS / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port())),
        *(str(EXAMPLES / "hf_trainer" / "train.py"), "--deepspeed", str(config)),
    ]


def accelerate_file(config: Path) -> list[str]:
    """Accelerate's, with a DeepSpeed configuration file."""
    return [
        *(str(SCRIPTS / "accelerate"), "launch", "--use_deepspeed", "--deepspeed_config_file", str(config)),
        *("--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port".split()),
        *(str(free_port()), str(EXAMPLES / "hf_trainer" / "train.py")),
    ]


def accelerate_flags(config: Path) -> list[str]:
    """Accelerate's, with its own flags and the optimizer of Transformers."""
    return [
        *(str(SCRIPTS / "accelerate"), "launch", "--use_deepspeed", "--zero_stage", "3" if "3" in config.name else "2"),
        *("--zero3_save_16bit_model", "true", "--gradient_clipping", "1.0"),
        *("--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port".split()),
        *(str(free_port()), str(EXAMPLES / "hf_trainer" / "train.py")),
    ]


LAUNCHERS: dict[str, Callable[[Path], list[str]]] = {
    "`deepspeed`": deepspeed,
    "`torchrun`": torchrun,
    "`accelerate launch` with a file": accelerate_file,
    "`accelerate launch` with flags": accelerate_flags,
}


@pytest.mark.quick("`deepspeed`-2", "`accelerate launch` with a file-3")
@pytest.mark.compat("Transformers Trainer", "started by {launcher}")
@pytest.mark.parametrize(
    ("launcher", "stage"),
    [
        ("`deepspeed`", 2),
        pytest.param("`deepspeed`", 3, marks=pytest.mark.matrix),
        ("`torchrun`", 3),
        ("`accelerate launch` with a file", 3),
        pytest.param("`accelerate launch` with flags", 3, marks=pytest.mark.matrix),
    ],
)
def test_the_trainer_starts_in_every_way_with_the_same_losses(launcher: str, stage: int, tmp_path: Path) -> None:
    command = LAUNCHERS[launcher](EXAMPLES / "hf_trainer" / f"zero{stage}.json")
    output = run([*command, "--output_dir", str(tmp_path), *TRAINER])
    found = re.search(r"ZeRO: True; loss (\d\.\d+) -> (\d\.\d+)", output)
    assert found and 5.0 < float(found[1]) < 6.0 and float(found[2]) < float(found[1])
    assert (tmp_path / "model.safetensors").stat().st_size > 50_000


@pytest.mark.compat("PEFT", "`examples/peft_lora`: launched, saved, merged into a plain model", stage=3)
def test_the_adapter_example_gives_the_same_loss_in_a_plain_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = EXAMPLES / "peft_lora"
    command = [
        *(str(SCRIPTS / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())),
        *(str(folder / "train.py"), "--deepspeed", str(folder / "zero3.json"), "--output_dir", str(tmp_path), *TRAINER),
    ]
    found = re.search(r"adapter (\d\.\d+), merged into a plain model (\d\.\d+)", run(command))
    assert found and float(found[1]) == pytest.approx(float(found[2]), abs=2e-4)


@pytest.mark.compat("Lightning Trainer", "`examples/lightning`: processes started by Lightning")
@pytest.mark.parametrize("stage", [3])
def test_the_lightning_example_learns(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    script = str(EXAMPLES / "lightning" / "train.py")
    arguments = f"--stage {stage} --steps 60 --width 64 --folder {tmp_path}".split()
    output = run([sys.executable, script, *arguments], MASTER_PORT=str(free_port()))
    found = re.search(r"loss (\d\.\d+) -> (\d\.\d+)", output)
    assert found and float(found[2]) < 0.5 < float(found[1])
    run(
        [
            sys.executable,
            str(tmp_path / "last.ckpt" / "zero_to_fp32.py"),
            str(tmp_path / "last.ckpt"),
            str(tmp_path / "out"),
        ]
    )
    assert (tmp_path / "out" / "pytorch_model.bin").exists()

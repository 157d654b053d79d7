"""Scripts that know nothing of the autotuner, tuned as they are: an example, and one of the Transformers Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(900)
LONG = pytest.mark.skipif(os.environ.get("DS_TEST_LONG") != "1", reason="real trials: make test-autotuning")
SECTION = {"enabled": True, "start_profile_step": 2, "end_profile_step": 3, "tuner_num_trials": 4}


def tune(folder: Path, config: dict[str, Any], script: Path, *arguments: str) -> dict[str, Any]:
    """The state that a search leaves."""
    (folder / "ds.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "2", "--autotuning", "tune"]
    subprocess.run(
        [*command, str(script), *arguments],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    state: dict[str, Any] = json.loads((folder / "autotuning_results/state.json").read_text())
    assert state["is_finished"]
    assert [done["state"] for done in state["outcomes"].values()] == ["measured"] * len(state["outcomes"])
    return state


@LONG
def test_an_example_is_tuned_unmodified(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": [1, 2],
        "zero_optimization": {"stage": [1, 3]},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "autotuning": SECTION,
    }
    arguments = ["--width", "32", "--layers", "2", "--heads", "2", "--deepspeed_config", "ds.json"]
    state = tune(tmp_path, config, ROOT / "examples/gpt/train.py", *arguments)
    assert len(state["outcomes"]) >= 3
    assert all(memory["fits"] for memory in state["info"]["memory"].values())
    best = json.loads((tmp_path / "autotuning_results/ds_config_optimal.json").read_text())
    assert best["train_micro_batch_size_per_gpu"] in (1, 2) and best["zero_optimization"]["stage"] in (1, 3)


@LONG
def test_a_trainer_script_is_tuned_unmodified_and_its_arguments_follow(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "zero_optimization": {"stage": [1, 2]},
        "autotuning": {**SECTION, "max_train_micro_batch_size_per_gpu": 4},
    }
    arguments = ["--output_dir", "out", "--use_cpu", "True", "--max_steps", "20", "--report_to", "none", "--save_strategy", "no",
                 "--per_device_train_batch_size", "1", "--deepspeed", "ds.json"]  # fmt: skip
    state = tune(tmp_path, config, Path(__file__).parent / "trainer_script.py", *arguments)
    best = json.loads((tmp_path / "autotuning_results/ds_config_optimal.json").read_text())
    words = (tmp_path / "autotuning_results/cmd_optimal.txt").read_text().split()
    size = words[words.index("--per_device_train_batch_size") + 1]
    assert int(size) == best["train_micro_batch_size_per_gpu"]
    assert {name.split("_")[0] for name in state["outcomes"]} <= {"z1", "z2"}

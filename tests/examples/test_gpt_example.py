"""The example of the README trains at every ZeRO stage, gives plain PyTorch's losses, and leaves what it promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_alone, run_ranks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "gpt"
SMALL = "--width 32 --layers 2 --heads 2 --seq 16 --steps 12 --eval-batches 4 --sample-bytes 8"
MODULES = ("train", "model", "data", "plain")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
    return path


def _example(rank: int, world_size: int, arguments: list[str]) -> None:
    """`train.main`, and no trace of the example's module names afterwards."""
    threads = torch.get_num_threads()
    sys.path.insert(0, str(EXAMPLE))
    try:
        import train

        train.main(arguments)
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in MODULES:
            sys.modules.pop(name, None)
        torch.set_num_threads(threads)


def _arguments(config: str, text: Path, run_dir: Path, *more: str) -> list[str]:
    config_path = str(EXAMPLE / f"{config}.json")
    return [*SMALL.split(), "--deepspeed_config", config_path, "--data", str(text), "--run-dir", str(run_dir), *more]


def _losses(run_dir: Path) -> dict[str, list[float]]:
    return json.loads((run_dir / "losses.json").read_text())


@pytest.fixture(scope="module")
def plain_losses(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    run_dir = tmp_path_factory.mktemp("plain")
    run_alone(_example, 0, 1, _arguments("zero0", text, run_dir, "--plain", "2"))
    return _losses(run_dir)


@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_gives_the_losses_of_plain_pytorch(
    stage: int, text: Path, tmp_path: Path, plain_losses: dict[str, Any]
) -> None:
    run_ranks(2, _example, _arguments(f"zero{stage}", text, tmp_path))
    losses = _losses(tmp_path)
    assert losses["train"] == pytest.approx(plain_losses["train"], rel=1e-5)
    assert losses["validation"] == pytest.approx(plain_losses["validation"], rel=1e-5)
    assert losses["validation"][1] < losses["validation"][0]


def test_training_from_a_disk_gives_the_losses_of_plain_pytorch(text: Path, tmp_path: Path) -> None:
    run_alone(_example, 0, 1, _arguments("zero3_nvme", text, tmp_path / "plain", "--plain", "2"))
    run_ranks(2, _example, _arguments("zero3_nvme", text, tmp_path / "nvme"))
    plain, offloaded = _losses(tmp_path / "plain"), _losses(tmp_path / "nvme")
    assert offloaded["train"] == pytest.approx(plain["train"], rel=1e-5)
    assert offloaded["validation"] == pytest.approx(plain["validation"], rel=1e-5)


@pytest.mark.parametrize("config", ["zero2_cpu", "zero3_cpu"])
def test_training_from_main_memory_lowers_the_loss(config: str, text: Path, tmp_path: Path) -> None:
    run_ranks(2, _example, _arguments(config, text, tmp_path))
    before, after = _losses(tmp_path)["validation"]
    assert after < before


def test_the_run_folder_has_a_picture_of_the_loss(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_ranks(2, _example, _arguments("zero3_bf16", text, tmp_path, "--tied"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_configurations_differ_in_the_zero_stage_only() -> None:
    configs = [json.loads((EXAMPLE / f"zero{stage}.json").read_text()) for stage in range(4)]
    assert [config.pop("zero_optimization") for config in configs] == [{"stage": stage} for stage in range(4)]
    assert configs == [configs[0]] * 4

"""Lightning's Trainer and Fabric over this package give what they give over plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from tests.integrations import lightning_jobs as jobs
from tests.integrations.common import run_job


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job(jobs.fit, str(tmp_path_factory.mktemp("plain")), None)


@pytest.mark.quick("2-", "3-optimizer, parameters")
@pytest.mark.compat("Lightning Trainer", "fit, validate, test, predict; accumulation, clipping, schedule")
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, ""), (2, ""), (3, ""), (2, "optimizer"), (3, "optimizer, parameters")]
)
def test_a_trainer_fits_tests_and_predicts_like_plain_pytorch(
    stage: int, offload: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    run = run_job(jobs.fit, str(tmp_path), stage, offload=bool(offload))
    assert run["losses"] == pytest.approx(plain["losses"], rel=1e-4) and run["losses"][-1] < run["losses"][0]
    assert run["val"] == pytest.approx(plain["val"], rel=1e-4) and run["test"] == pytest.approx(plain["test"], rel=1e-4)
    assert run["steps"] == run["engine_steps"] == plain["steps"] == 4
    torch.testing.assert_close(run["predictions"], plain["predictions"], rtol=1e-3, atol=1e-4)


@pytest.mark.compat("Lightning Trainer", "fit", precision="bf16")
@pytest.mark.parametrize("stage", [1, 3])
def test_bf16(stage: int, tmp_path: Path, plain: dict[str, Any]) -> None:
    run = run_job(jobs.fit, str(tmp_path), stage, precision="bf16-true")
    assert run["losses"] == pytest.approx(plain["losses"], rel=5e-2)


@pytest.mark.quick("3")
@pytest.mark.compat(
    "Lightning Trainer", "resume, test from a checkpoint, whole weights by `convert_zero_checkpoint_to_fp32_state_dict`"
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_fit_follows_the_uninterrupted_one_exactly(stage: int, tmp_path: Path) -> None:
    whole = run_job(jobs.resume, str(tmp_path), stage, False)
    rest = run_job(jobs.resume, str(tmp_path), stage, True)
    assert rest["losses"] == whole["losses"] and rest["steps"] == whole["steps"] and rest["test"] == whole["test"]
    assert {"checkpoint", "latest", "zero_to_fp32.py"} <= set(whole["files"])
    assert whole["whole"]["layers.0.weight"].shape == (32, 16)


@pytest.mark.quick("2")
@pytest.mark.compat("Fabric", "setup, backward, step of the optimizer, save, load")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fabric_steps_the_optimizer_alone(stage: int, tmp_path: Path) -> None:
    run = run_job(jobs.fabric, str(tmp_path), stage)
    plain = run_job(jobs.fabric, str(tmp_path), None)
    assert run["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert run["again"] == run["rest"]
    assert "ds_version" in run["left"] and run["kind"] == "_FabricOptimizer"


@pytest.mark.quick("3")
@pytest.mark.compat("Fabric", "several models, `no_backward_sync`, a model without optimizer loaded from a checkpoint")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fabric_trains_several_models_and_evaluates_another(stage: int, tmp_path: Path) -> None:
    run = run_job(jobs.fabric_of_several, str(tmp_path), stage)
    plain = run_job(jobs.fabric_of_several, str(tmp_path), None)
    assert run["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert run["is_loaded"] and run["left"] == ["ds_version", "epoch"]

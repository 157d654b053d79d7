"""The Transformers Trainer over this package gives the losses of the Trainer over plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.integrations import trainer_jobs as jobs
from tests.integrations.common import ADAMW, WARMUP_DECAY, ds_config, run_job, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The runs without this package, by whose schedule they follow."""
    folder = str(tmp_path_factory.mktemp("plain"))
    return {who: run_job(jobs.train, model, folder, None, delays_lr=who == "ds") for who in ("hf", "ds")}


def assert_equal_runs(run: dict[str, Any], plain: dict[str, Any], rel: float = 2e-5) -> None:
    assert run["is_deepspeed"] and not plain["is_deepspeed"]
    assert run["losses"] == pytest.approx(plain["losses"], rel=rel)
    assert run["norms"] == pytest.approx(plain["norms"], rel=50 * rel)
    assert run["eval"] == pytest.approx(plain["eval"], rel=rel)
    torch.testing.assert_close(run["predictions"], plain["predictions"], rtol=50 * rel, atol=50 * rel)
    assert run["losses"][-1] < run["losses"][0] - 0.5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("scheduler", ["ds", "hf"])
@pytest.mark.parametrize("optimizer", ["ds", "hf"])
def test_every_stage_and_pair_of_optimizer_and_scheduler_trains_like_plain_pytorch(
    stage: int, optimizer: str, scheduler: str, model: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    config = ds_config(stage)
    if optimizer == "ds":
        config["optimizer"] = ADAMW
    if scheduler == "ds":
        config["scheduler"] = WARMUP_DECAY
    assert_equal_runs(run_job(jobs.train, model, str(tmp_path), config), plain[scheduler])

"""Two ranks that share each sequence, by Accelerate's `ParallelismConfig(sp_backend="deepspeed")`, train like one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from tests.integrations import sequence_jobs as jobs
from tests.integrations.common import run_job, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain_trainer(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("plain"))
    return run_job(jobs.train_by_trainer, model, folder, None, 1, world_size=1)


@pytest.fixture(scope="module")
def plain_loop(model: str) -> dict[str, Any]:
    return run_job(jobs.train_by_accelerate, model, None, 1, world_size=1)


def config(stage: int) -> dict[str, Any]:
    """As the Trainer wants it."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


@pytest.mark.compat("Transformers Trainer", '`parallelism_config=ParallelismConfig(sp_backend="deepspeed")`')
@pytest.mark.parametrize("stage", [1, 3])
def test_the_trainer_s_curves_equal_one_process(
    stage: int, model: str, plain_trainer: dict[str, Any], tmp_path: Path
) -> None:
    found = run_job(jobs.train_by_trainer, model, str(tmp_path), config(stage), 2)
    assert found["losses"] == pytest.approx(plain_trainer["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(plain_trainer["norms"], rel=1e-3)
    assert found["eval"] == pytest.approx(plain_trainer["eval"], rel=1e-4)


@pytest.mark.compat(
    "Transformers Trainer", '`parallelism_config=ParallelismConfig(sp_backend="deepspeed")`, `train()` twice'
)
@pytest.mark.parametrize("stage", [1])
def test_a_second_training_equals_one_process(stage: int, model: str, tmp_path: Path) -> None:
    runs = [
        run_job(jobs.train_by_trainer, model, str(tmp_path / name), section, size, True, optim="sgd", world_size=size)
        for name, section, size in (("plain", None, 1), ("own", config(stage), 2))
    ]
    for key in ("losses", "norms", "eval"):
        assert runs[1][key] == pytest.approx(runs[0][key], rel=1e-3 if key == "norms" else 1e-4)


@pytest.mark.compat("Accelerate", '`ParallelismConfig(sp_backend="deepspeed", sp_size=2)` in a loop')
@pytest.mark.parametrize("stage", [2])
def test_a_loop_of_accelerate_equals_one_process(stage: int, model: str, plain_loop: dict[str, Any]) -> None:
    found = run_job(jobs.train_by_accelerate, model, stage, 2)
    assert found["losses"] == pytest.approx(plain_loop["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(plain_loop["norms"], rel=1e-4)


@pytest.mark.matrix
@pytest.mark.compat(
    "Accelerate", '`ParallelismConfig(sp_backend="deepspeed", sp_size=2)` and `autotp_size`: 2 in a loop'
)
@pytest.mark.parametrize("stage", [2])
def test_layers_and_sequences_are_divided_at_once_by_accelerate(
    stage: int, model: str, plain_loop: dict[str, Any]
) -> None:
    found = run_job(jobs.train_by_accelerate, model, stage, 2, 2, world_size=4)
    assert found["losses"] == pytest.approx(plain_loop["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(plain_loop["norms"], rel=1e-4)

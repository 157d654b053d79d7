"""Accelerate's loop over this package gives what it gives over plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from tests.integrations import accelerate_jobs as jobs
from tests.integrations.common import run_job, save_model
from tests.oracle import assert_close_weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: str) -> dict[str, Any]:
    return run_job(jobs.train, model, None)


@pytest.mark.compat(
    "Accelerate", "`DeepSpeedPlugin`, `accumulate`, `clip_grad_norm_`, `get_state_dict`, `unwrap_model`, `free_memory`"
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_plugin_in_the_script_trains_like_plain_pytorch(stage: int, model: str, plain: dict[str, Any]) -> None:
    found = run_job(jobs.train, model, stage)
    assert "DEEPSPEED" in found["kind"] and "DEEPSPEED" not in plain["kind"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    assert found["rates"] == plain["rates"] and found["is_unwrapped"] and not found["skipped"]
    assert_close_weights(found["state"], plain["state"], tolerance=1e-3)
    assert found["state"].keys() == plain["state"].keys()


@pytest.mark.compat(
    "Accelerate", "`DeepSpeedPlugin`, `accumulate`, `clip_grad_norm_`, `get_state_dict`, `unwrap_model`, `free_memory`"
)
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer, parameters")])
def test_offload_swaps_the_optimizer_and_changes_nothing(
    stage: int, offload: str, model: str, plain: dict[str, Any]
) -> None:
    where = {"offload_optimizer_device": "cpu", **({"offload_param_device": "cpu"} if "parameters" in offload else {})}
    found = run_job(jobs.train, model, stage, **where)
    assert found["losses"] == pytest.approx(plain["losses"], rel=2e-4)


@pytest.mark.compat("Accelerate", "configuration file, `DummyOptim`, `DummyScheduler`")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_configuration_file_with_dummy_optimizer_and_scheduler(stage: int, model: str, tmp_path: Path) -> None:
    found = run_job(jobs.train_by_config, model, jobs.write_config(tmp_path / "ds.json", stage), 8)
    assert found["kinds"] == ["DeepSpeedOptimizerWrapper", "DeepSpeedSchedulerWrapper"]
    assert found["rates"][:3] == pytest.approx([0, jobs.LR / 2, jobs.LR], rel=1e-6) and found["rates"][3] < jobs.LR
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.compat("Accelerate", "`save_state`, `load_state`, exactly")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_load_state_continues_exactly(stage: int, model: str, tmp_path: Path) -> None:
    whole = run_job(jobs.resume, model, stage, str(tmp_path), False)
    rest = run_job(jobs.resume, model, stage, str(tmp_path), True)
    assert rest["losses"] == whole["losses"] and rest["norms"] == whole["norms"] and rest["rates"] == whole["rates"]
    assert "pytorch_model" in whole["files"] and "latest" in whole["files"]


@pytest.mark.compat("Accelerate", "`get_state_dict` into a plain model", stage=3)
def test_zero_3_s_state_dict_is_on_the_cpu_and_loads_into_a_plain_model(model: str) -> None:
    state = run_job(jobs.train, model, 3, num_micro=2)["state"]
    assert {value.device.type for value in state.values()} == {"cpu"}
    plain = jobs.make_model(model)
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.lm_head.weight, state["model.embed_tokens.weight"])

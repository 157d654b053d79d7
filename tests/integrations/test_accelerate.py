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


def saving_config(stage: int, **extra: Any) -> dict[str, Any]:
    """A configuration in which nothing is too small to be sharded."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, **extra}


@pytest.mark.compat("Accelerate", "`save_pretrained` on every rank")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saving_on_every_rank_writes_the_gathered_weights_once(stage: int, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    start = save_model(tmp_path / "start", tie_word_embeddings=tied)
    found = run_job(jobs.save_on_every_rank, start, None, str(tmp_path / "saved"), saving_config(stage))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "0")
    for name, param in loaded.named_parameters():
        assert torch.equal(param, found["weights"][name]), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert "model.safetensors" in found["files"]
    assert not [path for path in (tmp_path / "saved" / "1").rglob("*") if path.is_file()]


@pytest.mark.compat("Accelerate", "`save_pretrained` of an adapter on every rank")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saving_an_adapter_on_every_rank_writes_it_once(stage: int, model: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from safetensors.torch import load_file

    from tests.integrations.peft_jobs import save_adapter

    adapter = save_adapter(model, str(tmp_path / "adapter"))
    found = run_job(jobs.save_on_every_rank, model, adapter, str(tmp_path / "saved"), saving_config(stage))
    saved = load_file(tmp_path / "saved" / "0" / "adapter_model.safetensors")
    assert len(saved) == 8
    for name, value in saved.items():
        assert torch.equal(value, found["weights"][name.replace(".weight", ".default.weight")]), name
    assert not [path for path in (tmp_path / "saved" / "1").rglob("*") if path.is_file()]

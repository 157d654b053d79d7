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


@pytest.mark.quick("hf-hf-3", "ds-ds-2")
@pytest.mark.compat(
    "Transformers Trainer", "train, evaluate, predict; optimizer and schedule of DeepSpeed or Transformers"
)
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


@pytest.mark.compat("Transformers Trainer", "train, evaluate", precision="bf16")
@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_trains_close_to_fp32(stage: int, model: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    run = run_job(jobs.train, model, str(tmp_path), ds_config(stage, optimizer=ADAMW), bf16=True)
    assert run["losses"] == pytest.approx(plain["hf"]["losses"], rel=1e-2)
    assert run["eval"] == pytest.approx(plain["hf"]["eval"], rel=1e-2)


@pytest.mark.quick("3-*")
@pytest.mark.compat("Transformers Trainer", "gradient checkpointing, both modes")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("stage", [2, 3])
def test_gradient_checkpointing_changes_nothing(
    stage: int, reentrant: bool, model: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    run = run_job(jobs.train, model, str(tmp_path), ds_config(stage, optimizer=ADAMW), **checkpointing)
    assert_equal_runs(run, plain["hf"])


@pytest.mark.quick("3")
@pytest.mark.compat("Transformers Trainer", "train, evaluate", precision="fp16")
@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_trains_close_to_fp32(stage: int, model: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    run = run_job(jobs.train, model, str(tmp_path), ds_config(stage, optimizer=ADAMW), fp16=True)
    assert run["losses"] == pytest.approx(plain["hf"]["losses"], rel=1e-3)
    assert run["eval"] == pytest.approx(plain["hf"]["eval"], rel=1e-3)


OFFLOAD = {
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "optimizer, parameters": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


@pytest.mark.quick("ds-3-optimizer, parameters", "hf-2-optimizer")
@pytest.mark.compat(
    "Transformers Trainer", "train, evaluate, predict; optimizer and schedule of DeepSpeed or Transformers"
)
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "optimizer, parameters")]
)
@pytest.mark.parametrize("optimizer", ["ds", "hf"])
def test_offload_changes_nothing(
    stage: int, offload: str, optimizer: str, model: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    own = {"optimizer": ADAMW} if optimizer == "ds" else {}
    run = run_job(jobs.train, model, str(tmp_path), ds_config(stage, zero=OFFLOAD[offload], **own))
    assert_equal_runs(run, plain["hf"])


@pytest.mark.quick("optimizer, parameters to NVMe")
@pytest.mark.compat("Transformers Trainer", "train, evaluate, predict; accumulation; on the NVMe tier", stage=3)
@pytest.mark.parametrize("offload", ["optimizer to NVMe", "optimizer, parameters to NVMe"])
def test_a_disk_changes_nothing(offload: str, model: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    where = {"device": "nvme", "nvme_path": str(tmp_path / "nvme")}
    zero = {"offload_optimizer": where, **({"offload_param": where} if "parameters" in offload else {})}
    run = run_job(jobs.train, model, str(tmp_path), ds_config(3, zero=zero, optimizer=ADAMW))
    assert_equal_runs(run, plain["hf"])


@pytest.mark.quick("3-optimizer, parameters", "2-")
@pytest.mark.compat("Transformers Trainer", "`safe_get_full_*` and `safe_set_full_*` in callbacks")
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, ""), (2, ""), (3, ""), (2, "optimizer"), (3, "optimizer, parameters")]
)
def test_a_callback_reads_and_sets_whole_values(stage: int, offload: str, model: str, tmp_path: Path) -> None:
    run = run_job(jobs.watch, model, str(tmp_path), ds_config(stage, zero=OFFLOAD.get(offload, {}), optimizer=ADAMW))
    plain = run_job(jobs.watch, model, str(tmp_path), None)
    assert run["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    for kind in ("weights", "moments"):
        torch.testing.assert_close(torch.stack(run[kind]), torch.stack(plain[kind]), rtol=1e-3, atol=1e-5)
    for gradient, clipped, norm in zip(run["gradients"], plain["gradients"], plain["norms"], strict=True):
        torch.testing.assert_close(gradient, clipped * max(1.0, norm / 0.5), rtol=1e-3, atol=1e-5)


@pytest.mark.quick("3-hf", "2-ds")
@pytest.mark.compat("Transformers Trainer", "resume from a checkpoint, exactly")
@pytest.mark.parametrize("optimizer", ["ds", "hf"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_follows_the_uninterrupted_one_exactly(
    stage: int, optimizer: str, model: str, tmp_path: Path
) -> None:
    config = ds_config(stage, **({"optimizer": ADAMW, "scheduler": WARMUP_DECAY} if optimizer == "ds" else {}))
    whole = run_job(jobs.resume, model, str(tmp_path), config, None)
    rest = run_job(jobs.resume, model, str(tmp_path), config, 3)
    assert rest["step"] == whole["step"] == jobs.STEPS
    assert rest["losses"][-3:] == whole["losses"][-3:] and rest["eval"] == whole["eval"]


@pytest.mark.compat("Transformers Trainer", "`load_best_model_at_end`, rotation")
@pytest.mark.parametrize("stage", [1, 3])
def test_the_best_model_is_loaded_at_the_end(stage: int, model: str, tmp_path: Path) -> None:
    found = run_job(jobs.keep_best, model, str(tmp_path), ds_config(stage, optimizer=ADAMW))
    assert Path(found["best"]).name == "checkpoint-2" and found["left"] == ["checkpoint-2"]
    assert found["eval"] == pytest.approx(found["evaluated"][2], rel=1e-6)
    assert found["evaluated"][6] < found["evaluated"][2]


@pytest.mark.quick("3")
@pytest.mark.compat("Transformers Trainer", "a second Trainer on the same model")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_second_trainer_takes_the_model_over(stage: int, model: str, tmp_path: Path) -> None:
    losses = run_job(jobs.second_trainer, model, str(tmp_path), ds_config(stage, optimizer=ADAMW))
    plain = run_job(jobs.second_trainer, model, str(tmp_path), None)
    assert losses == pytest.approx(plain, rel=2e-5)


@pytest.mark.compat("Transformers Trainer", "`train()` twice, `evaluate` first at stage 3")
@pytest.mark.parametrize("stage", [1, 3])
def test_a_trainer_trains_a_second_time(stage: int, model: str, tmp_path: Path) -> None:
    expected = run_job(jobs.train_twice, model, str(tmp_path / "plain"), None)
    found = run_job(jobs.train_twice, model, str(tmp_path / "own"), ds_config(stage), evaluates_first=stage == 3)
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert found["eval"] == pytest.approx(expected["eval"], rel=2e-5)


@pytest.mark.compat("Transformers Trainer", "`auto_find_batch_size`")
@pytest.mark.parametrize("stage", [1, 2])  # Transformers refuses it at stage 3
def test_a_batch_size_that_does_not_fit_is_halved_with_a_new_engine(stage: int, model: str, tmp_path: Path) -> None:
    found = run_job(jobs.find_batch_size, model, str(tmp_path), ds_config(stage))
    assert found["batch"] == 4 and len(found["losses"]) == 2


@pytest.mark.quick("3")
@pytest.mark.compat("Transformers Trainer", "`save_model`, loaded into a plain model")
@pytest.mark.parametrize("stage", [2, 3])
def test_the_saved_model_is_the_trained_one(stage: int, model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = run_job(jobs.train, model, str(tmp_path), ds_config(stage, optimizer=ADAMW))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    from tests.integrations.common import ByteDataset

    with torch.no_grad():
        logits = saved(input_ids=ByteDataset(8, offset=80).windows).logits
    torch.testing.assert_close(logits, run["predictions"], rtol=1e-5, atol=1e-5)

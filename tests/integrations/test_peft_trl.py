"""Adapters on a frozen, sharded base; SFT and DPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("trl")

from tests.integrations import peft_jobs as jobs
from tests.integrations.common import ADAMW, ByteDataset, ds_config, run_job, save_model, save_tokenizer
from tests.integrations.model_jobs import own_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = save_model(tmp_path_factory.mktemp("model"))
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return jobs.save_adapter(model, str(tmp_path_factory.mktemp("adapter")))


@pytest.fixture(scope="module")
def plain(model: str, adapter: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job(jobs.lora, model, adapter, str(tmp_path_factory.mktemp("plain")), None)


@pytest.mark.quick("3-False", "3-True", "2-None")
@pytest.mark.compat(
    "PEFT", "LoRA: train with and without checkpointing (both modes), save, load into a plain model, merge"
)
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("stage", [2, 3])
def test_lora_trains_like_plain_pytorch_and_its_adapter_loads_into_a_plain_model(
    stage: int, reentrant: bool | None, model: str, adapter: str, tmp_path: Path, plain: dict[str, Any]
) -> None:
    checkpointing = (
        {}
        if reentrant is None
        else {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    )
    run = run_job(jobs.lora, model, adapter, str(tmp_path), ds_config(stage, optimizer=ADAMW), **checkpointing)
    assert run["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    assert run["losses"][-1] < run["losses"][0] and run["trainable"] == plain["trainable"] == 896
    loaded = jobs.make_adapted(model, str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = loaded(input_ids=ByteDataset(8, offset=80).windows).logits
        torch.testing.assert_close(logits, run["predictions"], rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()(input_ids=ByteDataset(8, offset=80).windows).logits
        torch.testing.assert_close(merged, run["predictions"], rtol=1e-4, atol=1e-4)
    names = {Path(file).name for file in run["files"]}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


@pytest.mark.quick("3")
@pytest.mark.compat("PEFT", "resume an adapter, exactly")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_adapter_follows_the_uninterrupted_run_exactly(
    stage: int, model: str, adapter: str, tmp_path: Path
) -> None:
    config = ds_config(stage, optimizer=ADAMW)
    whole = run_job(jobs.lora, model, adapter, str(tmp_path), config)
    rest = run_job(jobs.lora, model, adapter, str(tmp_path), config, from_step=3)
    assert rest["losses"][-3:] == whole["losses"][-3:]
    assert torch.equal(rest["predictions"], whole["predictions"])


@pytest.mark.compat("PEFT", "merge and unmerge while sharded", stage=3)
def test_an_adapter_merges_inside_of_a_gather(model: str, adapter: str) -> None:
    config = own_config(3)
    del config["optimizer"]
    found = run_job(jobs.merge, model, adapter, config)
    torch.testing.assert_close(found["merged"], found["before"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["unmerged"], found["before"], rtol=1e-4, atol=1e-5)


@pytest.mark.compat("PEFT", "AdaLoRA prunes its ranks")
@pytest.mark.parametrize("stage", [0, 3])
def test_adalora_prunes_between_backward_and_step_like_plain_pytorch(stage: int, model: str) -> None:
    plain = run_job(jobs.adalora, model, None, world_size=1)
    assert run_job(jobs.adalora, model, stage) == pytest.approx(plain, rel=2e-5)


@pytest.mark.quick("3")
@pytest.mark.compat("PEFT", "`modules_to_save`")
@pytest.mark.parametrize("stage", [2, 3])
def test_modules_to_save_copies_a_sharded_module(stage: int, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", tie_word_embeddings=False)
    found = run_job(jobs.modules_to_save, folder, str(tmp_path / "out"), ds_config(stage, optimizer=ADAMW))
    plain = run_job(jobs.modules_to_save, folder, str(tmp_path / "plain"), None)
    assert found["losses"] == pytest.approx(plain["losses"], rel=2e-5)


@pytest.mark.quick("sft-2-True", "sft-3-False", "dpo-3-True")
@pytest.mark.compat("TRL", "SFT and DPO, whole model and LoRA")
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", [jobs.sft, jobs.dpo])
def test_trl_trains_like_plain_pytorch(method: Any, stage: int, with_lora: bool, model: str, tmp_path: Path) -> None:
    found = run_job(method, model, str(tmp_path / "ds"), ds_config(stage), with_lora)
    plain = run_job(method, model, str(tmp_path / "plain"), None, with_lora)
    assert len(found["losses"]) == 4 and found["losses"] == pytest.approx(plain["losses"], rel=1e-4)


@pytest.mark.compat("TRL", "`unwrap_model_for_generation`", stage=3)
def test_trl_takes_the_hooks_off_to_generate(model: str) -> None:
    from transformers import AutoModelForCausalLM

    config = ds_config(3, train_micro_batch_size_per_gpu=2)
    made = run_job(jobs.generate_unwrapped, model, config)
    assert made.shape == (2, 16)
    del AutoModelForCausalLM

"""Jobs that end in a refusal; each returns its words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepspeed
from tests.integrations.model_jobs import own_config, speech_config
from tests.integrations.peft_jobs import preferences, trl_arguments
from tests.integrations.trainer_jobs import arguments, curve, make_trainer


def speech(rank: int, world_size: int, folder: str) -> str:
    """`from_pretrained` of a weight-normed model at stage 3."""
    from transformers import Wav2Vec2ForCTC
    from transformers.integrations import HfDeepSpeedConfig

    if rank == 0:
        torch.manual_seed(0)
        Wav2Vec2ForCTC(speech_config()).save_pretrained(folder)
    torch.distributed.barrier()
    keep = HfDeepSpeedConfig(own_config(3))
    with pytest.raises(RuntimeError) as caught:
        Wav2Vec2ForCTC.from_pretrained(folder)
    del keep
    return str(caught.value)


def batch_size_search(rank: int, world_size: int, model_folder: str, folder: str, config: Any) -> str:
    with pytest.raises(ValueError) as caught:
        make_trainer(model_folder, arguments(folder, config, auto_find_batch_size=True))
    return str(caught.value)


def reference_ahead(
    rank: int, world_size: int, model_folder: str, folder: str, config: Any, *, is_sharded: bool = False
) -> tuple[str, list[float]]:
    """TRL's DPO that works out the reference ahead, of a model loaded before the arguments or by them: the words, or the losses."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = model_folder if is_sharded else AutoModelForCausalLM.from_pretrained(model_folder)
    args = trl_arguments(DPOConfig, folder, config, precompute_ref_log_probs=True, max_steps=2)
    given = {
        "train_dataset": Dataset.from_dict(preferences()),
        "processing_class": AutoTokenizer.from_pretrained(model_folder),
    }
    try:
        trainer = DPOTrainer(model=model, args=args, **given)
    except RuntimeError as error:
        return str(error), []
    trainer.train()
    return "", curve(trainer)


def cut_layers_from_file(rank: int, world_size: int, model_folder: str, folder: str, config: Any) -> str:
    with pytest.raises(NotImplementedError) as caught:
        make_trainer(model_folder, arguments(folder, config))
    return str(caught.value)


def lightning_on_cpu(rank: int, world_size: int) -> str:
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(RuntimeError) as caught:
        pl.Trainer(accelerator="cpu", devices=1, strategy="deepspeed_stage_2", logger=False).fit(BoringModel())
    return str(caught.value)


def default_clipping(rank: int, world_size: int) -> float:
    engine, *_ = deepspeed.initialize(
        model=torch.nn.Linear(2, 2),
        config={"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {}}},
    )
    return engine.gradient_clipping()

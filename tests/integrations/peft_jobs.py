"""Jobs with adapters (PEFT) and their trainers (TRL)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import deepspeed
from tests.integrations.common import ByteDataset, corpus
from tests.integrations.trainer_jobs import arguments, curve


def lora_config(**changes: Any) -> Any:
    """Rank 4 on the attention."""
    from peft import LoraConfig

    values = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**values, **changes})


def make_adapted(model_folder: str, adapter_folder: str) -> Any:
    """The base model with the adapter of a folder, so that every run starts from the same adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    return PeftModel.from_pretrained(base, adapter_folder, is_trainable=True)


def save_adapter(model_folder: str, folder: str, **changes: Any) -> str:
    """A randomly initialised adapter whose product is not zero; returns the folder."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder), lora_config(init_lora_weights=False, **changes)
    )
    model.save_pretrained(folder)
    return folder


def lora(
    rank: int,
    world_size: int,
    model_folder: str,
    adapter_folder: str,
    folder: str,
    config: Any,
    *,
    from_step: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Fine-tune an adapter on a frozen base under the Trainer; save it, and what the model says."""
    from transformers import Trainer

    args = arguments(folder, config, save_strategy="steps", save_steps=3, **changes)
    model = make_adapted(model_folder, adapter_folder)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    trainer = Trainer(model=model, args=args, train_dataset=ByteDataset(64), eval_dataset=ByteDataset(12, offset=64))
    trainer.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{from_step}") if from_step else None)
    prediction = trainer.predict(ByteDataset(8, offset=80))
    trainer.save_model(str(Path(folder) / "adapter"))
    return {
        "losses": curve(trainer),
        "predictions": torch.from_numpy(prediction.predictions),
        "trainable": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
        "files": sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*")),
    }


def merge(rank: int, world_size: int, model_folder: str, adapter_folder: str, config: dict[str, Any]) -> dict[str, Any]:
    """Gather a sharded adapted model, merge inside of the gather, and compare with what it computed before."""
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(config)
    model = make_adapted(model_folder, adapter_folder)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    windows = ByteDataset(2).windows
    with torch.no_grad():
        before = engine(input_ids=windows).logits
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.merge_adapter()
        merged = engine(input_ids=windows).logits
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            model.unmerge_adapter()
        unmerged = engine(input_ids=windows).logits
    del keep
    return {"before": before, "merged": merged, "unmerged": unmerged}


def adalora(rank: int, world_size: int, model_folder: str, stage: int | None) -> list[float]:
    """Losses of AdaLoRA, whose ranks are pruned by importance between backward and step; `stage` None is plain PyTorch."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    pruning = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=2,
        deltaT=1,
        total_step=6,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(0)
    model = get_peft_model(base, pruning)
    windows = ByteDataset(6 * 4).windows.view(6, 4, -1)
    losses = []
    if stage is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step, ids in enumerate(windows):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            model.base_model.update_and_allocate(step)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses
    config = {
        "train_micro_batch_size_per_gpu": 4 // world_size,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    keep = HfDeepSpeedConfig(config)  # by which PEFT knows to ask for whole gradients
    engine, *_ = deepspeed.initialize(model=model, config=config)
    adapters = [param for name, param in model.named_parameters() if "lora_" in name]
    for step, ids in enumerate(windows):
        share = ids.chunk(world_size)[rank]
        loss = engine(input_ids=share, labels=share).loss
        engine.backward(loss)
        with deepspeed.zero.GatheredParameters(adapters, modifier_rank=0):
            model.base_model.update_and_allocate(step)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world_size)
    del keep
    return losses


def modules_to_save(rank: int, world_size: int, model_folder: str, folder: str, config: Any) -> dict[str, Any]:
    """`modules_to_save` deep-copies a sharded head inside of a gather; it trains, the original does not."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    args = arguments(folder, config, max_steps=2)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(base, lora_config(modules_to_save=["lm_head"]))
    trainer = Trainer(model=model, args=args, train_dataset=ByteDataset(64))
    trainer.train()
    trainer.save_model(folder)
    return {"losses": curve(trainer)}


def texts(count: int) -> list[str]:
    """Lines of the text."""
    lines = [line.strip() for line in corpus().decode("utf-8", "ignore").splitlines() if len(line.strip()) > 20]
    return lines[:count]


def preferences() -> dict[str, list[str]]:
    """Prompts with a line that follows and one that does not."""
    lines = texts(96)
    return {
        "prompt": lines[:32],
        "chosen": [f" {x}" for x in lines[32:64]],
        "rejected": [f" {x}" for x in lines[64:96]],
    }


def trl_arguments(kind: Any, folder: str, deepspeed: Any, **changes: Any) -> Any:
    """A configuration of TRL with the settings of `arguments`."""
    common = {
        "output_dir": folder,
        "deepspeed": deepspeed,
        "use_cpu": True,
        "bf16": False,
        "ddp_backend": "gloo",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_length": 48,
        "seed": 1,
    }
    return kind(**{**common, **changes})


def sft(
    rank: int, world_size: int, model_folder: str, folder: str, config: Any, with_lora: bool, **changes: Any
) -> dict[str, Any]:
    """TRL's SFTTrainer on plain text."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    args = trl_arguments(SFTConfig, folder, config, **changes)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=args,
        train_dataset=Dataset.from_dict({"text": texts(64)}),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=lora_config() if with_lora else None,
    )
    trainer.train()
    trainer.save_model(folder)
    return {"losses": curve(trainer)}


def dpo(
    rank: int, world_size: int, model_folder: str, folder: str, config: Any, with_lora: bool, **changes: Any
) -> dict[str, Any]:
    """TRL's DPOTrainer, with a reference model of its own unless an adapter makes the base the reference."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = trl_arguments(DPOConfig, folder, config, **changes)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        ref_model=None if with_lora else AutoModelForCausalLM.from_pretrained(model_folder),
        args=args,
        train_dataset=Dataset.from_dict(preferences()),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=lora_config() if with_lora else None,
    )
    trainer.train()
    trainer.save_model(folder)
    return {"losses": curve(trainer)}


def generate_unwrapped(rank: int, world_size: int, model_folder: str, config: dict[str, Any]) -> torch.Tensor:
    """TRL's `unwrap_model_for_generation` around `generate`, then a training step."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from transformers import AutoModelForCausalLM
    from trl.models.utils import unwrap_model_for_generation

    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, optimizer = accelerator.prepare(model, optimizer)
    windows = ByteDataset(2).windows
    for _ in range(2):
        with unwrap_model_for_generation(engine, accelerator) as whole, torch.no_grad():
            made = whole.generate(
                windows[:, :8],
                attention_mask=torch.ones_like(windows[:, :8]),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
            )
        accelerator.backward(engine(input_ids=windows, labels=windows).loss)
    return made

"""Jobs under Accelerate: the user's own loop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from tests.integrations.common import ByteDataset

LR = 5e-3


def make_accelerator(
    stage: int | None, *, accumulation: int = 2, clip: float = 0.5, config: Any = None, **plugin: Any
) -> Any:
    """An Accelerator with a DeepSpeedPlugin as a script writes it; None for plain distributed training.

    The process group is named and `ACCELERATE_USE_DEEPSPEED` set, so that Accelerate takes the path of a GPU machine.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    if stage is None:
        return Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    made = (
        DeepSpeedPlugin(hf_ds_config=config)
        if config is not None
        else DeepSpeedPlugin(
            zero_stage=stage,
            gradient_accumulation_steps=accumulation,
            gradient_clipping=clip,
            zero3_init_flag=False,
            zero3_save_16bit_model=True,
            **plugin,
        )
    )
    return Accelerator(deepspeed_plugin=made, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


def make_loader() -> DataLoader[Any]:
    """Batches of two windows."""
    return DataLoader(ByteDataset(64), batch_size=2, shuffle=False)


def make_model(folder: str) -> Any:
    """The model of the folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def mean(loss: torch.Tensor) -> float:
    """The mean over ranks."""
    value = loss.detach().float().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def steps(
    accelerator: Any, model: Any, optimizer: Any, scheduler: Any, loader: Any, num_micro: int, clip: float
) -> dict[str, Any]:
    """The loop of Accelerate's documentation: losses by micro-batch, norms and learning rates by step."""
    losses, norms, rates = [], [], []
    for index, batch in enumerate(loader):
        if index == num_micro:
            break
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), clip)
                norms.append(float(norm))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(mean(loss))
        if accelerator.sync_gradients:
            rates.append(scheduler.get_last_lr()[0])
    return {"losses": losses, "norms": norms, "rates": rates}


def train(
    rank: int, world_size: int, model_folder: str, stage: int | None, num_micro: int = 8, **options: Any
) -> dict[str, Any]:
    """User's optimizer and scheduler; `accumulate`, `clip_grad_norm_`, `get_state_dict`, `unwrap_model`, `free_memory`."""
    from transformers import get_linear_schedule_with_warmup

    accelerator = make_accelerator(stage, **options)
    model = make_model(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 100)
    original = model
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, make_loader(), scheduler)
    found = steps(accelerator, model, optimizer, scheduler, loader, num_micro, 0.5)
    state = accelerator.get_state_dict(model)
    found["state"] = {name: value.clone() for name, value in state.items()} if state else None
    found["kind"] = str(accelerator.distributed_type)
    found["is_unwrapped"] = accelerator.unwrap_model(model) is original
    found["skipped"] = bool(accelerator.optimizer_step_was_skipped)
    accelerator.free_memory()
    return found


def train_by_config(rank: int, world_size: int, model_folder: str, config_file: str, num_micro: int) -> dict[str, Any]:
    """Optimizer and scheduler of a DeepSpeed configuration file, with `DummyOptim` and `DummyScheduler`."""
    from accelerate.utils import DummyOptim, DummyScheduler

    accelerator = make_accelerator(0, config=config_file)
    model = make_model(model_folder)
    optimizer = DummyOptim(model.parameters(), lr=LR)
    scheduler = DummyScheduler(optimizer, total_num_steps=200, warmup_num_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, make_loader(), scheduler)
    found = steps(accelerator, model, optimizer, scheduler, loader, num_micro, 0.5)
    found["kinds"] = [type(optimizer).__name__, type(scheduler).__name__]
    return found


def resume(rank: int, world_size: int, model_folder: str, stage: int, folder: str, continues: bool) -> dict[str, Any]:
    """Eight micro-batches with `save_state` after four; or, continuing, the last four after `load_state`."""
    from transformers import get_linear_schedule_with_warmup

    accelerator = make_accelerator(stage)
    model = make_model(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, eps=1e-6)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 100)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, make_loader(), scheduler)
    batches = list(loader)
    found: dict[str, Any] = {}
    if continues:
        accelerator.load_state(folder, load_module_strict=True)
    else:
        steps(accelerator, model, optimizer, scheduler, batches[:4], 4, 0.5)
        accelerator.save_state(folder)
        found["files"] = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
    accelerator.wait_for_everyone()
    found |= steps(accelerator, model, optimizer, scheduler, batches[4:8], 4, 0.5)
    return found


def write_config(path: Path, stage: int, **zero: Any) -> str:
    """A DeepSpeed configuration file for Accelerate."""
    params = {"lr": "auto", "weight_decay": "auto", "eps": 1e-6, "betas": [0.9, 0.999]}
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_type": "linear",
            },
        },
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,
            **zero,
        },
    }
    path.write_text(json.dumps(config))
    return str(path)


def save_on_every_rank(
    rank: int, world_size: int, model_folder: str, adapter_folder: str | None, folder: str, config: Any
) -> dict[str, Any]:
    """Train a step, then save as Accelerate documents it, on all ranks, each into a folder of its own; what was written, and the
    gathered weights."""
    import deepspeed

    accelerator = make_accelerator(0, config=config)
    model = make_model(model_folder)
    if adapter_folder is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter_folder, is_trainable=True)
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=LR)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    batch = next(iter(loader))
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    mine = Path(folder) / str(rank)
    whole = accelerator.unwrap_model(model)
    whole.save_pretrained(
        mine,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    with deepspeed.zero.GatheredParameters(list(whole.parameters())):
        weights = {name: param.detach().float().cpu().clone() for name, param in whole.named_parameters()}
    files = sorted(str(path.relative_to(mine)) for path in mine.rglob("*")) if mine.exists() else []
    weights["loss"] = model(**batch).loss.detach().float()
    return {"files": files, "weights": weights}

"""Jobs in which ranks share the layers of a model, by `autotp_size` under the Transformers Trainer and Accelerate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from tests.integrations import trainer_jobs
from tests.integrations.common import ByteDataset

AUTOTP = {"tensor_parallel": {"autotp_size": 2}}


@contextlib.contextmanager
def cleaned() -> Iterator[None]:
    """Take down the groups of the meshes that Accelerate makes of the first tensor-parallel ranks; the world stays."""
    try:
        yield
    finally:
        world = torch.distributed.group.WORLD
        made = [
            group for group in distributed_c10d._world.pg_map if group.group_desc == "mesh_tp" and group is not world
        ]
        for group in made:
            torch.distributed.destroy_process_group(group)


def train(
    rank: int,
    world_size: int,
    model_folder: str,
    folder: str,
    deepspeed: Any,
    *,
    saves: bool = False,
    resume_from: int | None = None,
    num_evaluated: int = 12,
    **changes: Any,
) -> dict[str, Any]:
    """Train, evaluate, save the model; with checkpoints at every third step, or from one of them on.

    The model is loaded before the arguments are made: Transformers 5.24 loads no file under zero.Init where `autotp_size` > 1.
    """
    from transformers import AutoModelForCausalLM, Trainer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    more = {"save_strategy": "steps", "save_steps": 3} if saves or resume_from else {}
    args = trainer_jobs.arguments(folder, deepspeed, **more, **changes)
    data = {"train_dataset": ByteDataset(64), "eval_dataset": ByteDataset(num_evaluated, offset=64)}
    trainer = Trainer(model=model, args=args, **data)  # type: ignore[arg-type]
    with cleaned():
        trainer.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{resume_from}") if resume_from else None)
        evaluation = trainer.evaluate()
        trainer.save_model(str(Path(folder) / f"saved{world_size}"))
    return {
        "losses": trainer_jobs.curve(trainer),
        "norms": trainer_jobs.norms(trainer),
        "eval": evaluation["eval_loss"],
    }


def loop(
    rank: int, world_size: int, model_folder: str, folder: str, stage: int | None, *, resumes: bool = False
) -> dict[str, Any]:
    """Losses and norms of a loop of Accelerate whose optimizer is made first; the state at half the way, the model at the end."""
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)  # before the plugin is made, as in `train`
    if stage is None:
        accelerator = Accelerator(cpu=True)
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
        section = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 1.0, "zero_optimization": zero}
        plugin = DeepSpeedPlugin(hf_ds_config={**section, **(AUTOTP if world_size > 1 else {})})
        accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    loader = DataLoader(ByteDataset(16), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, norms = [], []
    with cleaned():
        if resumes:
            accelerator.load_state(folder)
        for step, batch in enumerate(loader):
            if resumes and step < 4:
                continue
            loss = model(**batch).loss
            accelerator.backward(loss)
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if step == 3 and stage is not None and not resumes:
                accelerator.save_state(folder)
        whole = accelerator.get_state_dict(model)
        accelerator.unwrap_model(model).save_pretrained(
            f"{folder}/saved", is_main_process=accelerator.is_main_process, state_dict=whole
        )
    return {"losses": losses, "norms": norms}

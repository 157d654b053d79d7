"""Jobs in which two ranks share each sequence, under the Transformers Trainer and in a loop of Accelerate."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tests.integrations import trainer_jobs
from tests.integrations.common import ByteDataset


class Positioned(ByteDataset):
    """With position ids, which the parts of a sequence need; some labels at the beginning do not count."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        sample["labels"][:5] = -100
        return {**sample, "position_ids": torch.arange(len(sample["input_ids"]))}


def parallelism(size: int) -> Any:
    """Accelerate's description; None for one rank."""
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    if size == 1:
        return None
    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    return ParallelismConfig(sp_backend="deepspeed", sp_size=size, dp_shard_size=1, sp_handler=handler)


def clean_up(size: int) -> None:
    """Leave the process as good as new."""
    if size > 1:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()


def train_by_trainer(
    rank: int,
    world_size: int,
    model_folder: str,
    folder: str,
    deepspeed: Any,
    size: int,
    train_twice: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Curves of losses and norms, and an evaluation on whole sequences at the end."""
    more: dict[str, Any] = {"parallelism_config": parallelism(size)} if size > 1 else {}
    args = trainer_jobs.arguments(folder, deepspeed, **more, **changes)
    data = {"train_dataset": Positioned(64), "eval_dataset": Positioned(12, offset=64)}
    trainer = trainer_jobs.make_trainer(model_folder, args, **data)
    trainer.train()
    if train_twice:
        trainer.train()
    found = {
        "losses": trainer_jobs.curve(trainer),
        "norms": trainer_jobs.norms(trainer),
        "eval": trainer.evaluate()["eval_loss"],
    }
    clean_up(size)
    return found


def plugin(stage: int, tp: int) -> Any:
    """Accelerate's settings; with layers cut over `tp` ranks by a configuration."""
    from accelerate import DeepSpeedPlugin

    if tp == 1:
        return DeepSpeedPlugin(zero_stage=stage, gradient_clipping=1.0)
    section = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": tp},
    }
    return DeepSpeedPlugin(hf_ds_config=section)


def train_by_accelerate(
    rank: int, world_size: int, model_folder: str, stage: int | None, size: int, tp: int = 1
) -> dict[str, Any]:
    """Losses and norms of a loop that weighs the ranks' losses by their tokens, as Accelerate's documentation does."""
    import torch.distributed.nn.functional as collectives
    from accelerate import Accelerator, InitProcessGroupKwargs
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    if stage is None:
        accelerator = Accelerator(cpu=True)
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        accelerator = Accelerator(
            deepspeed_plugin=plugin(stage, tp),
            parallelism_config=parallelism(size),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Positioned(16), batch_size=2)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses, norms = [], []
    for batch in loader:
        if size == 1:
            loss = model(**batch).loss
        else:
            from deepspeed.utils import groups

            group = groups._get_sequence_parallel_group()
            targets = batch.pop("shift_labels")
            logits = model(**batch).logits
            loss = model.module.loss_function(logits, None, model.module.config.vocab_size, shift_labels=targets)
            count = (targets != -100).sum()
            total = collectives.all_reduce(count.clone(), group=group)
            if world_size > size:  # torch's all_gather has no backward on gloo where the group is a part of the ranks
                loss = collectives.all_reduce(loss.nan_to_num() * count, group=group) / total
            else:
                found = torch.stack(collectives.all_gather(loss, group=group))
                counts = torch.stack(collectives.all_gather(count, group=group))
                loss = (torch.where(counts > 0, found, 0.0) * counts).sum() / total
        accelerator.backward(loss)
        if size == 1:
            norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        if size > 1:
            norms.append(float(model.get_global_grad_norm()))
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if tp > 1 and rank < tp:  # Accelerate's own mesh of tensor-parallel ranks
        torch.distributed.destroy_process_group(accelerator.state.ds_device_mesh.get_group())
    clean_up(size)
    return {"losses": losses, "norms": norms, "skipped": accelerator.optimizer_step_was_skipped}

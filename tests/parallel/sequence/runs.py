"""Small models of Transformers trained with parts of sequences, and the same in one process with plain PyTorch.

Imported by the tests of sequence parallelism. `train` runs on every rank of a pool and returns the losses and the reduced
gradients of its model; `plain` is the oracle, on whole sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

VOCAB = 61
Batch = dict[str, Tensor]


def tiny_model(
    heads: int = 4, kv: int = 2, attention: str = "sdpa", seed: int = 1, layers: int = 2, **more: Any
) -> nn.Module:
    """A Llama of two layers, or of `model_type`."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = more.pop("model_type", "llama")
    config = CONFIG_MAPPING[kind](
        vocab_size=VOCAB,
        hidden_size=heads * 8,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=8,
        max_position_embeddings=256,
        attn_implementation=attention,
        use_cache=False,
        **more,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def batch_of(kind: str, length: int = 16, samples: int = 1, seed: int = 3) -> Batch:
    """kind: "plain", "packed" (documents by position ids), "padded" (right), "left" or "holes" (by mask)."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (samples, length), generator=make)
    positions = torch.arange(length).expand(samples, -1).clone()
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids.clone()}
    if kind == "packed":
        for row in range(samples):
            cut = length // 3 + row
            positions[row, cut:] = torch.arange(length - cut)
            batch["labels"][row, cut] = -100
    elif kind in ("padded", "left", "holes"):
        mask = torch.ones(samples, length, dtype=torch.long)
        for row in range(samples):
            if kind == "padded":
                mask[row, length - 2 - row :] = 0
            elif kind == "left":
                mask[row, : 2 + row] = 0
            else:
                mask[row, 3 + row : 5 + row] = 0
        batch["attention_mask"] = mask
        batch["labels"][mask == 0] = -100
    return batch


def cut(batch: Batch, rank: int, num_ranks: int) -> Batch:
    """A rank's part, as long as the others' or by one longer."""
    own = {name: tensor.tensor_split(num_ranks, dim=-1)[rank] for name, tensor in batch.items() if name != "labels"}
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return own | {"shift_labels": targets.tensor_split(num_ranks, dim=-1)[rank].contiguous()}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the targets of one process' whole batch."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def plain(model: nn.Module, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of the batches and its gradients, in one process."""
    loss = sum(loss_of(model, batch) for batch in batches) / len(batches)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_loss(engine: Any, part: Batch, recipe: str, group: Any) -> Tensor:
    """The loss that a script hands to the engine, by what it does with the ranks' losses."""
    import torch.distributed as dist
    import torch.distributed.nn.functional as collectives

    if recipe == "labels":
        return engine(**part).loss
    targets = part["shift_labels"]
    if recipe == "own":
        return engine(**part, labels=targets).loss
    logits = engine(**{k: v for k, v in part.items() if k != "shift_labels"}).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
    count = (targets != -100).sum()
    if recipe == "gathered":
        losses = torch.stack(collectives.all_gather(loss, group=group))
        counts = torch.stack(collectives.all_gather(count, group=group))
        return (torch.where(counts > 0, losses, 0.0) * counts).sum() / counts.sum()
    assert recipe == "reduced"
    weighted = loss.nan_to_num() * count
    total = count.clone()
    dist.all_reduce(weighted, group=group)
    dist.all_reduce(total, group=group)
    return weighted / total


def config_of(stage: int, **more: Any) -> dict[str, Any]:
    """fp32, plain SGD that changes nothing."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        **more,
    }


def gradients_of(engine: Any) -> dict[str, Tensor]:
    """The reduced gradients, whole. Collective."""
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters() if p.requires_grad}


def train(
    rank: int, world: int, size: int, stage: int, batches: list[Batch], recipe: str, model_args: dict[str, Any]
) -> tuple[float, dict[str, Tensor]]:
    """One backward over this rank's part of its batch; the loss and the reduced gradients."""
    torch.manual_seed(rank)
    model = tiny_model(**model_args)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, model_args.get("attention", "sdpa"), size, micro_batch_size=1
    )
    try:
        engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=config_of(stage))
        part = cut(batches[rank // size], rank % size, size)
        if recipe == "labels":
            own = batches[rank // size]["labels"].tensor_split(size, dim=-1)[rank % size]
            part = {k: v for k, v in part.items() if k != "shift_labels"} | {"labels": own}
        loss = own_loss(engine, part, recipe, parallel_state_sp.get_sequence_parallel_group())
        engine.backward(loss)
        found = gradients_of(engine)
        engine.step()
        engine.destroy()
    finally:
        UlyssesSPAttentionHF.unregister()
        parallel_state_sp.destroy_sequence_parallel()
    return float(loss.detach()), found


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any gradient, relative to its tensor's largest value."""
    assert found.keys() == expected.keys(), f"{found.keys() ^ expected.keys()}"
    return max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected)


def ratio(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Least-squares factor between all gradients."""
    a = torch.cat([found[n].flatten() for n in expected])
    b = torch.cat([expected[n].flatten() for n in expected])
    return float((a @ b) / (b @ b))

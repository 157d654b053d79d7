"""Writes the files in `original/` with DeepSpeed 0.19.8; and the model and batches they come from, for the tests.

Run on two ranks in an environment that has the original, from an empty folder, with the environment of a launcher:

    python make_original.py STAGE {fp32,bf16} OUTPUT_DIR [SUB_GROUP_SIZE]
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn

NUM_STEPS = 3


class Net(nn.Module):
    """Tied, frozen and plain parameters of odd sizes, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.a = nn.Linear(6, 9)
        self.n = nn.LayerNorm(9)
        self.b = nn.Linear(9, 6)
        self.frozen = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("count", torch.arange(4.0))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.emb(x)
        h = self.frozen(h + self.b(torch.tanh(self.n(self.a(h)))))
        return nn.functional.cross_entropy(self.head(h).float(), y)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without."""
    trained = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [param for param in trained if param.dim() > 1]},
        {"params": [param for param in trained if param.dim() < 2], "weight_decay": 0.0},
    ]


def batch(step: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """A rank's share of 8 samples."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(step + 1):
        x = torch.randint(0, 11, (8,), generator=generator)
        y = torch.randint(0, 11, (8,), generator=generator)
    share = 8 // world_size
    return x[rank * share : (rank + 1) * share], y[rank * share : (rank + 1) * share]


def main() -> None:
    """Train and save."""
    import deepspeed

    stage, precision, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 8 // world_size,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": int(sys.argv[4]) if len(sys.argv) > 4 else 10**9,
        },
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups_of(model), config=config)
    for step in range(NUM_STEPS):
        engine.backward(engine(*batch(step, rank, world_size)))
        engine.step()
    engine.save_checkpoint(folder, client_state={"epoch": 7})
    if rank == 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = get_fp32_state_dict_from_zero_checkpoint(folder)
        torch.save({name: value.clone() for name, value in state.items()}, f"{folder}/expected.pt")
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()

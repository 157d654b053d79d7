"""Writes the files in `original/` with DeepSpeed 0.19.8: two steps of the model of `models.py`, saved.

In an environment that has the original and pytest, from the repository's root, on as many ranks as wanted, with the environment
of a launcher:

    python -m tests.parallel.expert.make_original STAGE EP {fp32,bf16} CLIP OUTPUT_DIR
"""

from __future__ import annotations

import os
import sys

import torch

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from tests.parallel.expert.models import NUM_EXPERTS, WIDTH, FeedForward, Model, batches, set_values, whole_names


def main() -> None:
    """Train, print the third loss, and save before it."""
    stage, ep, kind, clip, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]), sys.argv[5]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    arguments = {"ep_size": ep, "k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False}
    model = Model([MoE(WIDTH, FeedForward(), NUM_EXPERTS, **arguments) for _ in range(2)])
    set_values(model, whole_names(model, ep, rank))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": kind == "bf16"},
    }
    deepspeed.init_distributed("gloo")
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "main"})
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.01, eps=1e-5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    for number, step in enumerate(batches(3, world_size)):
        if number == 2:
            engine.save_checkpoint(output, tag="two", client_state={"mine": 7})
        x, y = step[rank]
        loss = engine(x.to(dtype), y)
        engine.backward(loss)
        engine.step()
        print(f"rank {rank} step {number} loss {loss.item()}", flush=True)


if __name__ == "__main__":
    main()

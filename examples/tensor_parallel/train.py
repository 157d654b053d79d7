"""Train a causal model of Transformers whose layers are cut over ranks.

    deepspeed --num_gpus 4 examples/tensor_parallel/train.py --tp 2 --stage 2

Ranks 0 and 1 have a part of every layer each, ranks 2 and 3 the same parts: two groups that read two different batches. The
script has no other line for it than `autotp_size` and the sampler, which counts groups. `--tp 1` is the same run with whole
layers: the losses are equal. `--cut-logits` keeps the logits, the largest tensor of a small model, cut as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import deepspeed


class Repeats(Dataset[dict[str, Tensor]]):
    """Random tokens, and the same again."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        half = torch.randint(vocabulary, (count, length // 2), generator=torch.Generator().manual_seed(0))
        self.tokens = torch.cat([half, half], dim=1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index].clone()}


def make_model(args: argparse.Namespace) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.seq,
            use_cache=False,
        )
    )


def main(argv: list[str] | None = None) -> list[float]:
    """The losses of all steps, means over groups, which rank 0 also writes to `--losses`."""
    args = parse(argv)
    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "zero_optimization": {"stage": args.stage},
        "tensor_parallel": {"autotp_size": args.tp, "vocab_parallel_lm_head": args.cut_logits or None},
        "gradient_clipping": 1.0,
        "steps_per_print": 0,
    }
    engine, *_ = deepspeed.initialize(model=make_model(args), config=config)
    groups = world // args.tp
    data = Repeats(args.steps * args.batch, args.seq, args.vocabulary)
    sampler: DistributedSampler[Any] = DistributedSampler(data, groups, rank // args.tp, shuffle=False)
    losses = []
    for batch in DataLoader(data, batch_size=args.batch // groups, sampler=sampler):
        loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / world)
    if rank == 0:
        print(f"layers on {args.tp} ranks each: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        if args.losses:
            args.losses.write_text(json.dumps(losses))
    engine.destroy()
    return losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="ranks that share layers; 1 leaves them whole")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--cut-logits", action="store_true", help="keep logits cut over the vocabulary")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step, over all groups")
    parser.add_argument("--seq", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=97)
    parser.add_argument("--losses", type=Path, help="where rank 0 writes the losses, as JSON")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by launchers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

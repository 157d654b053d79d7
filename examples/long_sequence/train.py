"""Train a causal model of Transformers on sequences that no rank has as a whole.

    deepspeed --num_gpus 2 examples/long_sequence/train.py --sp 2 --seq 4096

Every rank draws samples of its own; the adapter has the `--sp` ranks of a group go through them together, each with its part
of each sequence. Attention exchanges heads for tokens (Ulysses, with a ring inside where there are fewer key heads than
ranks); MLPs and the loss run tile by tile, and blocks are computed again in backward, so that memory grows by little more
than one hidden state per token and block. `--sp 1` is the same run with whole sequences: the losses are equal.
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
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter
from deepspeed.sequence import tile_model


class Repeats(Dataset[dict[str, Tensor]]):
    """Random tokens, and the same again: what the second half is can be learned from far back in the sequence only."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        half = torch.randint(vocabulary, (count, length // 2), generator=torch.Generator().manual_seed(0))
        self.tokens = torch.cat([half, half], dim=1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": tokens.clone(), "position_ids": torch.arange(len(tokens))}


def make_model(args: argparse.Namespace) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.seq,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tile_model(model, mlp_tokens=args.tile, loss_tokens=args.tile)


def main(argv: list[str] | None = None) -> list[float]:
    """The losses of all steps, which rank 0 also writes to `--losses`."""
    args = parse(argv)
    deepspeed.init_distributed()
    model = make_model(args)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=args.sp,
        micro_batch_size=1,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
        "zero_optimization": {"stage": args.stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 0,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=mpu)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    data = Repeats(args.steps * world // args.sp, args.seq, args.vocabulary)
    sampler: DistributedSampler[Any] = DistributedSampler(data, world, rank, shuffle=False)
    loader: Any = DataLoader(data, batch_size=1, sampler=sampler)
    if mpu is not None:
        loader = UlyssesSPDataLoaderAdapter(
            loader,
            sp_rank=mpu.get_sequence_parallel_rank(),
            sp_group=mpu.get_sequence_parallel_group(),
            sp_world_size=args.sp,
            device=engine.device,
        )
    engine.train()
    losses = []
    for batch in loader:
        loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}).loss
        engine.backward(loss)  # this rank's own mean: the engine weighs it by its tokens
        engine.step()
        tokens = (batch.get("shift_labels", batch["labels"] if args.sp == 1 else None) != -100).sum()
        sums = torch.stack([loss.detach() * tokens, tokens.to(loss.dtype)])
        torch.distributed.all_reduce(sums)
        losses.append(float(sums[0] / sums[1]))
        if rank == 0:
            print(
                f"step {len(losses):3d}   loss {losses[-1]:.4f}   {args.seq // args.sp} of {args.seq} tokens per rank"
            )
    if rank == 0 and args.losses:
        Path(args.losses).write_text(json.dumps(losses))
    engine.destroy()
    return losses


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Sizes; the defaults run on a laptop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "sp": 1, "stage": 1, "seq": 512, "steps": 8, "width": 64, "layers": 2, "heads": 4, "kv-heads": 2, "vocabulary": 256,
        "tile": 128,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--losses", default=None, help="file for the losses, JSON")
    parser.add_argument("--local_rank", type=int, default=-1)
    return deepspeed.add_config_arguments(parser).parse_args(argv)


if __name__ == "__main__":
    main()

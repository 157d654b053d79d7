"""A Mixtral of Hugging Face, random and tiny, whose experts are spread over ranks by the configuration alone."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

import deepspeed

VOCAB, SEQ = 64, 24


def batch(size: int, step: int, rank: int) -> torch.Tensor:
    """Sequences that count up from a random start: [size, SEQ]."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start = torch.randint(VOCAB, (size, 1), generator=generator)
    return (start + torch.arange(SEQ)) % VOCAB


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the mean losses over all ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = deepspeed.add_config_arguments(parser).parse_args(arguments)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
        )
    )
    engine, *_ = deepspeed.initialize(args=args, model=model)
    losses = []
    for step in range(args.steps):
        ids = batch(engine.train_micro_batch_size_per_gpu(), step, dist.get_rank()).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        told = loss.detach().float()
        dist.all_reduce(told)
        losses.append(float(told) / dist.get_world_size())
    held = model.model.layers[0].mlp.experts.down_proj.shape if engine.zero_optimization_stage() < 3 else "a shard"
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; of 8 experts this rank holds {held}")
    engine.destroy()
    return losses


if __name__ == "__main__":
    main()

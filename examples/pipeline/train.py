"""Train a model cut in depth: a small GPT, or AlexNet as in the CIFAR tutorial, on generated data.

deepspeed --num_gpus 2 examples/pipeline/train.py --pipeline-parallel-size 2
deepspeed --num_gpus 2 examples/pipeline/train.py --model alexnet --schedule zb-h1 --print-actions
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import deepspeed
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

VOCAB, SEQ, WIDTH = 64, 16, 32


class Embedding(nn.Module):
    """Tokens to hidden states; `logits` reads it backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.1)
        self.position = nn.Parameter(torch.randn(SEQ, WIDTH) * 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight) + self.position


def logits(module: Embedding, hidden: Tensor) -> Tensor:
    """The tied output head."""
    return hidden @ module.weight.t()


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


def token_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the next token."""
    return nn.functional.cross_entropy(scores.float().flatten(0, 1), labels.flatten())


def gpt(num_blocks: int) -> list[Any]:
    """Described layers: each rank builds its own alone. The embedding is tied to the head."""
    blocks = [LayerSpec(Block) for _ in range(num_blocks)]
    tied = {"tied_weight_attr": "weight"}
    return [
        TiedLayerSpec("embed", Embedding, **tied),
        *blocks,
        TiedLayerSpec("embed", Embedding, forward_fn=logits, **tied),
    ]


def alexnet() -> list[Any]:
    """Live modules and a function, for images of 32 x 32."""
    return [
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(4), lambda x: torch.flatten(x, 1), nn.Dropout(), nn.Linear(512, 64),
        nn.ReLU(inplace=True), nn.Linear(64, 10),
    ]  # fmt: skip


class Samples(Dataset[Any]):
    """Counting sequences, or images whose mean colour is their class."""

    def __init__(self, model: str, size: int = 256) -> None:
        generator = torch.Generator().manual_seed(0)
        starts, steps = (torch.randint(1, 8, (size, 1), generator=generator) for _ in range(2))
        tokens = (starts + steps * torch.arange(SEQ + 1)) % VOCAB
        classes = torch.randint(10, (size,), generator=generator)
        images = torch.randn(size, 3, 32, 32, generator=generator) * 0.1 + classes.view(-1, 1, 1, 1) / 5
        self.inputs, self.labels = (tokens[:, :-1], tokens[:, 1:]) if model == "gpt" else (images, classes)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


def main(argv: list[str] | None = None) -> list[float]:
    """See the module's text; the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--model", choices=["gpt", "alexnet"], default="gpt")
    parser.add_argument("--pipeline-parallel-size", "-p", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--schedule", default="auto")
    parser.add_argument("--print-actions", action="store_true")
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    net = PipelineModule(
        layers=gpt(4) if args.model == "gpt" else alexnet(),
        num_stages=args.pipeline_parallel_size,
        loss_fn=token_loss if args.model == "gpt" else nn.CrossEntropyLoss(),
        partition_method="parameters",
        seed_layers=True,
    )
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3}},
        "zero_optimization": {"stage": args.zero},
        "pipeline": {"schedule": args.schedule},
        "steps_per_print": 0,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        training_data=Samples(args.model),
        config=config,
    )
    is_first = torch.distributed.get_rank() == 0
    if args.print_actions and is_first:
        print(engine.actions)
    losses = []
    for step in range(args.steps):
        loss = engine.train_batch()
        losses.append(loss.item())
        if is_first and (step % 5 == 0 or step == args.steps - 1):
            print(f"step {step} loss {losses[-1]:.4f}", flush=True)
    engine.destroy()
    return losses


if __name__ == "__main__":
    main()

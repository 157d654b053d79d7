"""An image classifier with layers of experts: which expert a picture goes to is learned with everything else.

Two layers of experts, with different numbers of them (PR-MoE, arXiv:2201.05596, with `--residual`), on `--ep-size` ranks.
The data is made up: each class is a pattern, and each picture a noisy copy in one of two contrasts.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

WIDTH, CLASSES, SIDE = 84, 10, 16


class Pictures:
    """Endless pictures; a batch is a function of (step, rank)."""

    def __init__(self) -> None:
        self.pattern = torch.randn(CLASSES, SIDE * SIDE, generator=torch.Generator().manual_seed(0))

    def batch(self, size: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
        """(pictures [size, SIDE * SIDE], classes [size])."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        classes = torch.randint(CLASSES, (size,), generator=generator)
        contrast = torch.randint(2, (size, 1), generator=generator) * 2 - 1
        noise = torch.randn(size, SIDE * SIDE, generator=generator)
        return self.pattern[classes] * contrast + noise, classes


class Classifier(nn.Module):
    """Linear, layers of experts, linear."""

    def __init__(self, num_experts: list[int], ep_size: int, k: int, residual: bool, noise: str | None) -> None:
        super().__init__()
        self.first = nn.Linear(SIDE * SIDE, WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.experts = nn.ModuleList(
            MoE(
                hidden_size=WIDTH,
                expert=expert,
                num_experts=count,
                ep_size=ep_size,
                k=k,
                use_residual=residual,
                min_capacity=0,
                noisy_gate_policy=noise,
            )
            for count in num_experts
        )
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, pictures: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(loss, accuracy, per layer how many pictures chose each expert)."""
        x = torch.relu(self.first(pictures))
        auxiliary, counts = x.new_zeros(()), []
        for layer in self.experts:
            output, l_aux, of_layer = layer(x)
            x, auxiliary = x + output, auxiliary + l_aux
            counts.append(of_layer)
        scores = self.last(x).float()
        loss = nn.functional.cross_entropy(scores, classes) + 0.01 * auxiliary
        return loss, (scores.argmax(1) == classes).float().mean(), counts


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the mean losses over all ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--num-experts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ep-size", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--noisy-gate-policy", choices=["Jitter", "RSample"])
    parser.add_argument("--local_rank", type=int, default=-1)
    args = deepspeed.add_config_arguments(parser).parse_args(arguments)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = Classifier(args.num_experts, args.ep_size, args.top_k, args.residual, args.noisy_gate_policy)
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": [p for p in model.parameters() if p.requires_grad], "name": "parameters"}
    )
    engine, *_ = deepspeed.initialize(args=args, model=model, model_parameters=groups)
    data, losses = Pictures(), []
    for step in range(args.steps):
        pictures, classes = data.batch(engine.train_micro_batch_size_per_gpu(), step, dist.get_rank())
        dtype = engine.get_data_types()[0]
        loss, accuracy, counts = engine(pictures.to(engine.device, dtype), classes.to(engine.device))
        engine.backward(loss)
        engine.step()
        told = torch.stack([loss.detach().float(), accuracy.float()])
        dist.all_reduce(told)
        losses.append(float(told[0]) / dist.get_world_size())
    if dist.get_rank() == 0:
        loads = ", ".join(str(of_layer.tolist()) for of_layer in counts)
        print(
            f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; accuracy {float(told[1]) / dist.get_world_size():.2f}; loads {loads}"
        )
    engine.destroy()
    return losses


if __name__ == "__main__":
    main()

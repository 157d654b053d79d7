"""A recommender: large embedding tables, a small network (after DLRM, arXiv:1906.00091), clicks to predict.

Nearly all parameters are rows of tables, of which a batch touches few. ZeRO-2 shards their gradients and moments, ZeRO-3
the tables too. The data is made up: users and items have hidden vectors, and a click is likely where they agree.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed

CATEGORIES = (20, 7)


class Clicks:
    """Endless impressions; a batch is a function of (step, rank)."""

    def __init__(self, users: int, items: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.user, self.item = (torch.randn(count, 4, generator=generator) for count in (users, items))
        self.effect = [torch.randn(count, generator=generator) for count in CATEGORIES]

    def batch(self, size: int, step: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [size, 4], numbers [size, 3], clicked [size])."""
        generator = torch.Generator().manual_seed(1000 * step + rank)
        counts = (len(self.user), len(self.item), *CATEGORIES)
        ids = torch.stack([torch.randint(count, (size,), generator=generator) for count in counts], 1)
        numbers = torch.randn(size, 3, generator=generator)
        score = (self.user[ids[:, 0]] * self.item[ids[:, 1]]).sum(1) + 0.5 * numbers[:, 0]
        score = score + sum(effect[ids[:, 2 + i]] for i, effect in enumerate(self.effect))
        return ids, numbers, (score > 0).float()


class Recommender(nn.Module):
    """Tables, their pairwise products, a network on top."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, width) for count in (users, items, *CATEGORIES))
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.3)
        self.bottom = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
        pairs = (len(self.tables) + 1) * len(self.tables) // 2
        self.top = nn.Sequential(nn.Linear(pairs + width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ids: Tensor, numbers: Tensor, clicked: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        vectors = torch.stack([dense, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        products = vectors @ vectors.transpose(1, 2)
        rows, columns = torch.triu_indices(vectors.shape[1], vectors.shape[1], 1)
        score = self.top(torch.cat([products[:, rows, columns], dense], 1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(score, clicked)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the mean losses over all ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = deepspeed.add_config_arguments(parser).parse_args(arguments)
    config = json.loads(Path(args.deepspeed_config or Path(__file__).with_name("zero2.json")).read_text())
    deepspeed.init_distributed(verbose=False)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=config["zero_optimization"]["stage"] == 3):
        torch.manual_seed(0)
        model = Recommender(args.users, args.items, args.width)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    clicks, losses = Clicks(args.users, args.items), []
    for step in range(args.steps):
        batch = clicks.batch(engine.train_micro_batch_size_per_gpu(), step, engine.global_rank)
        loss = engine(*(value.to(engine.device) for value in batch))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(mean.item() / engine.world_size)
    if engine.global_rank == 0:
        kind = engine.memory_by_kind()
        print(f"loss {losses[0]:.3f} -> {sum(losses[-10:]) / 10:.3f}")
        print(
            f"at rest on this rank: {kind['parameters'] / 1e6:.2f} MB of parameters, {kind['optimizer'] / 1e6:.2f} of moments"
        )
    engine.destroy()
    return losses


if __name__ == "__main__":
    main()

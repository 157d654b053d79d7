"""A classifier under Lightning with `strategy="deepspeed_stage_N"`: points on two spirals.

Lightning lets its DeepSpeed strategies run on CUDA alone. Where there is none, this script lifts that check, and the
check of device numbers, in a subclass of Lightning's strategy; the rest is the same.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class OnCpu(DeepSpeedStrategy):
    """Lightning's strategy without its insistence on CUDA."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def spirals(count: int) -> TensorDataset:
    """Points of two spirals and which they belong to."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(2, (count,), generator=generator)
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    turned = angle + math.pi * label
    points = torch.stack([turned.cos(), turned.sin()], 1) * angle[:, None] / 5
    return TensorDataset(points + 0.05 * torch.randn(count, 2, generator=generator), label)


class Classifier(pl.LightningModule):
    """Three layers; built in `configure_model`, which at ZeRO stage 3 builds them sharded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers: nn.Module | None = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.layers is None:
            w = self.width
            self.layers = nn.Sequential(nn.Linear(2, w), nn.GELU(), nn.Linear(w, w), nn.GELU(), nn.Linear(w, 2))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        assert self.layers is not None
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(arguments: list[str] | None = None) -> list[float]:
    """Train; the losses of this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--folder", default="runs/lightning")
    args = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=args.devices,
        strategy=f"deepspeed_stage_{args.stage}" if on_gpu else OnCpu(stage=args.stage, process_group_backend="gloo"),
        max_steps=args.steps,
        gradient_clip_val=1.0,
        default_root_dir=args.folder,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    pl.seed_everything(0, verbose=False)
    model = Classifier(args.width)
    trainer.fit(model, DataLoader(spirals(2048), batch_size=32, shuffle=True))
    trainer.save_checkpoint(f"{args.folder}/last.ckpt")
    if trainer.is_global_zero:
        print(f"loss {model.losses[0]:.3f} -> {sum(model.losses[-10:]) / 10:.3f}")
    return model.losses


if __name__ == "__main__":
    main()

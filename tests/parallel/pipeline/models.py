"""Small models that are lists of layers, their batches, and how a test trains them: cut, and in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.parallel.pipeline.module import PipelineModule

WIDTH, STEPS = 16, 2
LONG = bool(os.environ.get("DS_TEST_LONG"))
"""Also the long matrices: make test-pipeline."""


def mlp(seed: int = 0) -> list[nn.Module]:
    """Nine layers; a stage that begins with the fifth or sixth meets an operation in place."""
    torch.manual_seed(seed)
    return [
        nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH),
        nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 4),
    ]  # fmt: skip


def batches(num: int, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs [4, WIDTH], labels [4, 4]) of a rank."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(num):
        x, y = (
            torch.randn(4 * num_ranks, WIDTH, generator=generator),
            torch.randn(4 * num_ranks, 4, generator=generator),
        )
        yield x[rank::num_ranks], y[rank::num_ranks]


def config_of(zero: int = 0, accumulation: int = 4, schedule: str = "auto", **more: Any) -> dict[str, Any]:
    """A configuration without optimizer."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
        "pipeline": {"schedule": schedule},
        **more,
    }


def start(module: PipelineModule, config: dict[str, Any], lr: float = 0.1) -> Any:
    """An engine with SGD."""
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    return deepspeed.initialize(model=module, config=config, optimizer=optimizer)[0]


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """This rank's stages' weights."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def train(engine: Any, steps: int = STEPS) -> dict[str, Any]:
    """Losses, the last norm, the weights."""
    per_step = engine.gradient_accumulation_steps()
    data = batches(steps * per_step, engine.mesh.rank("batch"), engine.mesh.size("batch"))
    losses = [engine.train_batch(data).item() for _ in range(steps)]
    engine.settle_step()
    return {"losses": losses, "norm": engine.get_global_grad_norm(), "weights": whole_weights(engine)}


def train_plain(
    layers: list[nn.Module], accumulation: int = 4, num_ranks: int = 1, steps: int = STEPS, clip: float = 1e9
) -> dict[str, Any]:
    """One process that accumulates the same micro-batches in plain PyTorch."""
    torch.set_num_threads(1)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, norm = [], 0.0
    data = [list(batches(steps * accumulation, rank, num_ranks)) for rank in range(num_ranks)]
    for step in range(steps):
        total = torch.zeros(())
        for micro in range(step * accumulation, (step + 1) * accumulation):
            for mine in data:
                x, y = mine[micro]
                loss = nn.functional.mse_loss(model(x), y) / num_ranks
                (loss / accumulation).backward()
                total = total + loss.detach()
        losses.append((total / accumulation).item())
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norm": norm, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def joined(found: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The weights of all ranks."""
    weights: dict[str, Tensor] = {}
    for mine in found:
        weights.update(mine["weights"])
    return weights

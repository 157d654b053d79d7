"""Ranks may be given other kinds and amounts of data than their neighbours: the losses and weights are those of DDP by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.runs import engine_of, make_config, small_units
from tests.harness import run_ranks

WIDTH = 8


class VisionLanguage(nn.Module):
    """A tower that text-only batches do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)

    def forward(self, ids: Tensor, pixels: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """The loss of predicting `ids` [batch, seq] from themselves and from `pixels` [patches, 6]."""
        hidden = self.embed(ids)
        if pixels is not None:
            hidden = hidden + self.tower(pixels).mean(0)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


def _batch(kind: str, step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(0, 20, (2, 5), generator=generator)
    if kind == "an image on one rank":
        return {"ids": ids, **({"pixels": torch.randn(4, 6, generator=generator)} if rank == step % 2 else {})}
    if kind == "flat patches":
        return {"ids": ids, "pixels": torch.randn(4 + 3 * rank, 6, generator=generator)}
    if kind == "packed":
        return {"ids": ids.view(1, -1), "lengths": torch.tensor([0, 4, 10] if rank else [0, 3, 6, 10])}
    return {"ids": ids[: 2 - rank]}


def _by_hand(kind: str, rank: int) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model, losses = VisionLanguage(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-5)
    for step in range(4):
        loss = model(**_batch(kind, step, rank))
        loss.backward()
        losses.append(loss.item())
        for param in model.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
            dist.all_reduce(param.grad)
            param.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


def differ(rank: int, world_size: int, kind: str, stage: int) -> None:
    expected, weights = _by_hand(kind, rank)
    torch.manual_seed(0)
    model, losses = VisionLanguage(), []
    config = make_config(stage, micro=2)
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "eps": 1e-5}}
    with small_units(), engine_of(model, config) as engine:
        for step in range(4):
            loss = engine(**_batch(kind, step, rank))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        found: dict[str, Any] | None = engine._consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for name in found or {}:  # consolidated on the first rank alone
        torch.testing.assert_close(found[name], weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["an image on one rank", "flat patches", "packed", "filled by tokens"])
def test_other_data_on_another_rank_trains_as_by_hand(kind: str, stage: int) -> None:
    run_ranks(2, differ, kind, stage)

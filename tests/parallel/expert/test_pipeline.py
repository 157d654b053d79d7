"""Experts inside of a pipeline's stages: two stages, in each of them experts on two ranks, equal one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from tests.engine.runs import make_config
from tests.harness import run_ranks
from tests.parallel.expert.models import CLASSES, LONG, NUM_EXPERTS, WIDTH, FeedForward, Loop, batches, set_values
from tests.parallel.expert.runs import CLIP, whole_names

SGD = {"type": "SGD", "params": {"lr": 0.3}}
Steps = list[tuple[float, float]]
"""(loss, norm before clipping) of each step."""


class Added(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(x)[0]
        return out


def layers(make: Callable[[], nn.Module], in_both: bool) -> nn.ModuleList:
    """Of two stages both have experts, or the first alone."""
    experts, plain = [Added(make()), Added(make())], nn.Linear(WIDTH, WIDTH)
    return nn.ModuleList([*((plain, *experts) if in_both else (*experts, plain)), nn.Linear(WIDTH, CLASSES)])


def spread() -> nn.Module:
    return MoE(WIDTH, FeedForward(), NUM_EXPERTS, 2, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)


def train(rank: int, world_size: int, stage: int, in_both: bool) -> Steps:
    made = layers(spread, in_both)
    set_values(made, whole_names(made, 2, rank))
    model = PipelineModule(layers=list(made), num_stages=2, loss_fn=F.cross_entropy, partition_method="uniform")
    config = make_config(stage, micro=6, accumulation=2, clip=CLIP, optimizer=SGD)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    found = []
    for step in batches(3, 2, 48):
        x, y = step[rank % 2]
        loss = engine.train_batch(iter(list(zip(x.split(12), y.split(12), strict=True))))
        found.append((float(loss), float(engine.get_global_grad_norm())))
    engine.destroy()
    return found


def plain(in_both: bool) -> Steps:
    made = layers(lambda: Loop(2), in_both)
    set_values(made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.3)
    found = []
    for step in batches(3, 2, 48):
        losses = []
        for x, y in step:
            for part, labels in zip(x.split(12), y.split(12), strict=True):
                for layer in made:
                    part = layer(part)
                losses.append(F.cross_entropy(part, labels))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(made.parameters(), CLIP)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def check(stage: int, in_both: bool = True) -> None:
    """Four ranks against one process."""
    expected = plain(in_both)
    for found in run_ranks(4, train, stage, in_both):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-6) and norm == pytest.approx(wanted_norm, rel=1e-5)


STAGES = (0, 1, 2, 3)


@pytest.mark.parametrize("stage", [stage if stage == 1 else pytest.param(stage, marks=LONG) for stage in STAGES])
def test_a_pipeline_with_spread_experts_equals_one_process(stage: int) -> None:
    check(stage)
    line = PIPELINES.format(stage)
    assert line in (Path(__file__).resolve().parents[3] / "docs" / "composability.md").read_text()


def test_a_stage_without_experts_does_not_leave_the_others_waiting() -> None:
    check(1, in_both=False)


PIPELINES = "| 2 | 2 | `MoE` | {} | 4 | equals one process |"
"""A line of docs/composability.md."""

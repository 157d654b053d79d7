"""Pipelines saved by DeepSpeed 0.19.8 (`original_pipeline/`, made by `make_original_pipeline.py`) load into any number of stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import pipe
from deepspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.checkpoint.make_original_pipeline import NUM_STEPS, batches, config_of, layers, token_loss
from tests.harness import run_ranks

FOLDER = Path(__file__).parent / "original_pipeline"
AFTER = [2.9820141792297363, 2.492908239364624]
"""What two more steps of the original gave from `z1`."""


def _go_on(rank: int, world: int, folder: str, zeros: list[int]) -> list[Any]:
    found = []
    for zero in zeros:
        torch.manual_seed(9)
        module = pipe.PipelineModule(layers(pipe), num_stages=world, loss_fn=token_loss, partition_method="uniform")
        engine = deepspeed.initialize(model=module, config=config_of(zero), model_parameters=list(module.parameters()))[
            0
        ]
        path, client = engine.load_checkpoint(folder, tag="z1")
        assert path is not None
        data = batches()
        for _ in range(2 * NUM_STEPS):
            next(data)
        found.append(
            ([engine.train_batch(data).item() for _ in range(2)], engine.global_steps, client["note"], engine.get_lr())
        )
        engine.destroy()
    return found


def test_a_pipeline_of_the_original_goes_on_with_its_optimizer() -> None:
    for world, zeros in ((2, [1, 3]), (1, [0])):
        for runs in run_ranks(world, _go_on, str(FOLDER), zeros):
            for losses, steps, note, _ in runs:
                assert losses == pytest.approx(AFTER, rel=1e-5)
                assert (steps, note) == (NUM_STEPS + 2, 7)


def test_its_weights_are_told_by_name() -> None:
    weights = get_fp32_state_dict_from_zero_checkpoint(FOLDER, tag="z1")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "tied_modules.embed.weight": (11, 6), "1.weight": (9, 6), "1.bias": (9,), "3.weight": (6, 9), "3.bias": (6,), "4.weight": (6,),
        "4.bias": (6,),
    }  # fmt: skip
    files = torch.load(FOLDER / "z1" / "layer_03-model_states.pt", weights_only=True)
    assert torch.equal(weights["3.weight"], files["weight"])


def _weights_alone(rank: int, world: int) -> None:
    module = pipe.PipelineModule([nn.Linear(6, 9)], num_stages=1, loss_fn=nn.MSELoss())
    engine = deepspeed.initialize(model=module, config=config_of(0))[0]
    with pytest.raises(Exception, match="shapes differ"):
        engine.load_checkpoint(str(FOLDER), tag="z0")
    engine.destroy()


def test_layers_that_are_not_the_model_s_are_refused_by_name() -> None:
    run_ranks(1, _weights_alone)

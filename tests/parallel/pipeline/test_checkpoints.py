"""What a pipeline saves, any other number of stages loads, with optimizer state, and an unpipelined run too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
from deepspeed.parallel.pipeline.layers import LayerError
from deepspeed.parallel.pipeline.module import PipelineModule
from tests.harness import run_ranks
from tests.parallel.pipeline.models import batches, config_of, joined, mlp, start, whole_weights
from tests.parallel.pipeline.test_engine import tied_layers, token_batches, token_loss


def _cut(stages: int, chunks: int, placement: Any, seed: int) -> PipelineModule:
    return PipelineModule(
        mlp(seed),
        num_stages=stages,
        loss_fn=nn.MSELoss(),
        partition_method="uniform",
        num_chunks=chunks,
        placement=placement,
    )


def _save(rank: int, world: int, folder: str) -> dict[str, Any]:
    engine = start(_cut(2, 1, "loop", 0), config_of(1))
    data = batches(8)
    engine.train_batch(data)
    engine.save_checkpoint(folder)
    found = {"loss": engine.train_batch(data).item(), "weights": whole_weights(engine)}
    engine.destroy()
    return found


def _load(rank: int, world: int, folder: str, others: list[tuple[int, int, Any]]) -> list[dict[str, Any]]:
    found = []
    for zero, chunks, placement in others:
        engine = start(_cut(world, chunks, placement, 9), config_of(zero))
        engine.load_checkpoint(folder)
        data = batches(8)
        for _ in range(4):
            next(data)
        found.append({"loss": engine.train_batch(data).item(), "weights": whole_weights(engine)})
        engine.destroy()
    return found


def _load_whole(rank: int, world: int, folder: str) -> float:
    model = nn.Sequential(*mlp(9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = {name: value for name, value in config_of(2).items() if name != "pipeline"}
    engine = deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]
    engine.load_checkpoint(folder)
    data, total = list(batches(8))[4:], torch.zeros(())
    for x, y in data:
        loss = nn.functional.mse_loss(engine(x), y)
        engine.backward(loss)
        engine.step()
        total = total + loss.detach()
    engine.destroy()
    return (total / 4).item()


def test_any_number_of_stages_goes_on_where_another_stopped(tmp_path: Path) -> None:
    saved = run_ranks(2, _save, str(tmp_path))
    for world, others in ((2, [(1, 1, "loop"), (3, 2, "v")]), (1, [(0, 1, "loop")])):
        found = run_ranks(world, _load, str(tmp_path), others)
        for i in range(len(others)):
            mine = [theirs[i] for theirs in found]
            assert all(part["loss"] == saved[0]["loss"] for part in mine)
            weights = joined(mine)
            differ = {name: (weights[name] - value).abs().max().item() for name, value in joined(saved).items()}
            assert not any(differ.values()), f"cut {others[i]} on {world} ranks: {differ}"
    assert run_ranks(1, _load_whole, str(tmp_path)) == [saved[0]["loss"]]


def _tied(seed: int) -> PipelineModule:
    torch.manual_seed(seed)
    return PipelineModule(
        tied_layers(), num_stages=2, loss_fn=token_loss, seed_layers=True, base_seed=seed, partition_method="uniform"
    )


def _tied_elsewhere(rank: int, world: int, folder: str) -> None:
    """A tied module's parameters, those that nobody named among them, from two stages to two others, in both kinds of files."""
    engine = start(_tied(7), config_of(1))
    engine.train_batch(token_batches(4))
    engine.save_checkpoint(folder)
    saved, wanted = engine.module, whole_weights(engine)
    engine.module.save_state_dict(f"{folder}/layers")
    engine.destroy()
    dist.barrier()
    engine = start(_tied(8), config_of(0))
    engine.load_checkpoint(folder)
    assert all(torch.equal(value, wanted[name]) for name, value in whole_weights(engine).items())
    engine.destroy()
    module = _tied(9)
    module.load_state_dir(f"{folder}/layers")
    assert all(torch.equal(param, wanted[name]) for name, param in module.named_parameters())
    own = module.ckpt_layer_path(f"{folder}/layers", 0)
    assert own == saved.ckpt_layer_path(f"{folder}/layers", 0)
    dist.barrier()
    if rank == 1:
        Path(own).unlink()
    with pytest.raises(LayerError, match=r"\[rank 1\] .*layer_0\d-model_states.pt is missing"):
        module.load_state_dir(f"{folder}/layers")


def test_tied_modules_are_saved_and_loaded_whole(tmp_path: Path) -> None:
    run_ranks(2, _tied_elsewhere, str(tmp_path))

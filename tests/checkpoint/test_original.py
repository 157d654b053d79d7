"""Checkpoints written by DeepSpeed 0.19.8 (`original/`, made by `make_original.py`) load, train on, and consolidate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeed.utils.errors import CheckpointError
from tests.checkpoint.make_original import NUM_STEPS, Net, batch, groups_of
from tests.engine.runs import engine_of, whole_weights
from tests.harness import run_ranks

FOLDER = Path(__file__).parent / "original"
ALL = sorted(path.name for path in FOLDER.iterdir())


def test_all_stages_and_precisions_are_here() -> None:
    assert ALL == ["z1-bf16", "z1-fp32", "z2-bf16", "z2-fp32", "z3-bf16", "z3-fp32", "z3-fp32-sub"]


@pytest.mark.parametrize("name", ALL)
def test_consolidation_gives_what_the_originals_own_tool_gave(name: str) -> None:
    expected = torch.load(FOLDER / name / "expected.pt", weights_only=True)
    actual = get_fp32_state_dict_from_zero_checkpoint(FOLDER / name)
    # The original's tool leaves frozen parameters out at stage 1; they are in its files.
    assert actual.keys() - expected.keys() <= {"frozen.weight", "frozen.bias"}
    assert len(actual) == 11
    for key, value in expected.items():
        assert torch.equal(actual[key], value.float()), key


def _go_on(
    rank: int, world_size: int, name: str, stage: int
) -> tuple[dict[str, Tensor], list[Any], dict[str, Any] | None]:
    model = Net()
    config = {
        "train_micro_batch_size_per_gpu": 8 // world_size,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "bf16": {"enabled": name.endswith("bf16")},
        "gradient_clipping": 1.0,
    }
    with engine_of(model, config, model_parameters=groups_of(model)[::-1]) as engine:
        path, client = engine.load_checkpoint(str(FOLDER / name))
        assert path is not None
        lr = engine.get_lr()
        for step in range(NUM_STEPS, NUM_STEPS + 2):
            x, y = batch(step, rank, world_size)
            engine.backward(engine(x, y))
            engine.step()
        settings = [group["weight_decay"] for group in engine.optimizer.param_groups]
        return whole_weights(engine), [engine.global_steps, lr, settings], client


@pytest.mark.parametrize(
    ("name", "stage", "world_size"), [("z1-fp32", 3, 1), ("z2-fp32", 2, 2), ("z3-fp32", 0, 4), ("z3-fp32-sub", 1, 2)]
)
def test_a_run_goes_on_as_plain_pytorch_would(name: str, stage: int, world_size: int) -> None:
    weights, (steps, _, decays), client = run_ranks(world_size, _go_on, name, stage)[0]
    assert client is not None
    assert (steps, decays, client["epoch"]) == (NUM_STEPS + 2, [0.0, 0.01], 7)
    for key, value in _plain().items():
        assert torch.allclose(weights[key], value, rtol=1e-4, atol=2e-6), key


def _plain() -> dict[str, Tensor]:
    """The same training, all of it, in plain PyTorch."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, weight_decay=0.01)
    schedule = deepspeed.runtime.lr_schedules.WarmupLR(optimizer, warmup_num_steps=10)
    for step in range(NUM_STEPS + 2):
        model(*batch(step, 0, 1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("name", ["z1-bf16", "z2-bf16", "z3-bf16"])
def test_bf16_runs_go_on(name: str) -> None:
    exact, rounded = _plain(), run_ranks(2, _go_on, name, 2)[0][0]
    for key, value in exact.items():
        assert (rounded[key] - value).abs().max() < 0.05, key


def test_other_pickled_objects_are_refused_by_name(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "z2-fp32", tmp_path / "copy") / "global_step3"
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(path, weights_only=True), "extra": Net()}, path)
    with pytest.raises(
        CheckpointError, match=r"(?s)mp_rank_00_model_states.pt holds pickled objects of .*make_original.Net.*refused"
    ):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "copy")


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "z3-fp32", tmp_path / "copy") / "global_step3"
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="file of rank 0 is missing"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "copy")


def test_parts_of_ranks_that_shared_layers_without_a_word_where_they_lie_are_refused_with_a_cure(
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(FOLDER / "z2-fp32", tmp_path / "copy") / "global_step3"
    for path in list(folder.glob("*mp_rank_00*")):
        shutil.copy(path, folder / path.name.replace("mp_rank_00", "mp_rank_01"))
    with pytest.raises(CheckpointError, match=r"(?s)shared layers, and does not say how.*export whole weights"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "copy")

"""Checkpoints of ranks that shared layers, written by DeepSpeed 0.19.8 (`original/`, made by `make_original.py`), load at any size and train on."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeed.utils.errors import CheckpointError
from tests.harness import run_ranks
from tests.parallel.tensor.make_original import CASES, NUM_STEPS, batch, config_of, model_of
from tests.parallel.tensor.models import LONG

pytest.importorskip("transformers")
FOLDER = Path(__file__).parent / "original"
NEXT = 3
"""Steps after the checkpoint: the second one's loss has the moments in it."""


def plain(name: str) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses of each reader in the steps after the checkpoint, and the weights in it, by plain PyTorch in fp32."""
    case = CASES[name]
    model = model_of(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    losses, weights = [], {}
    for step in range(NUM_STEPS + NEXT):
        if step == NUM_STEPS:
            weights = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.param_groups[0]["lr"] = 0.0 if step == 0 else 1e-2 * math.log10(step)
        found = [model(**batch(step, reader)).loss for reader in range(case["dp"])]
        torch.stack(found).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(loss.detach()) for loss in found])
    return losses[NUM_STEPS:], weights


def go_on(rank: int, world: int, name: str, tp: int, stage: int) -> list[float]:
    """The losses of the next steps, of a model that begins with other weights."""
    case = {**CASES[name], "tp": tp, "stage": stage}
    torch.manual_seed(1)
    model = model_of(case)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.5)
    if case.get("kind") == "bf16":
        model = model.bfloat16()
    config = config_of(case)
    config["tensor_parallel"].pop("partition_config", None)  # ours cuts by the family's plan
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    path, client = engine.load_checkpoint(str(FOLDER), tag=name)
    assert path is not None and client["mine"] == 7 and engine.global_steps == NUM_STEPS
    assert "universal_checkpoint_info" not in client
    losses = []
    for step in range(NUM_STEPS, NUM_STEPS + NEXT):
        loss = engine(**batch(step, rank // tp)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    engine.destroy()
    return losses


@pytest.mark.parametrize(
    ("name", "tp", "stage"),
    [
        ("z1-dp2", 1, 3),
        ("z3-dp2", 2, 1),
        ("z0", 3, 0),
        pytest.param("z0", 1, 3, marks=LONG),
        pytest.param("z0", 4, 1, marks=LONG),
        pytest.param("z0-bf16", 1, 0, marks=LONG),
        pytest.param("z0-bf16", 2, 2, marks=LONG),
        pytest.param("z1-tied", 1, 2, marks=LONG),
        pytest.param("z1-tied", 3, 0, marks=LONG),
        pytest.param("z1-uneven", 3, 2, marks=LONG),
        pytest.param("z1-uneven", 1, 3, marks=LONG),
        pytest.param("z2-bf16", 1, 3, marks=LONG),
        pytest.param("z2-bf16", 4, 1, marks=LONG),
        pytest.param("z2-fused", 1, 0, marks=LONG),
        pytest.param("z2-fused", 2, 3, marks=LONG),
        pytest.param("z3-dp2", 4, 0, marks=LONG),
        pytest.param("z3-dp2", 1, 3, marks=LONG),
    ],
)
def test_a_run_goes_on_at_any_size_as_plain_pytorch_would(name: str, tp: int, stage: int) -> None:
    wanted, _ = plain(name)
    found = run_ranks(tp * CASES[name]["dp"], go_on, name, tp, stage)
    for rank, losses in enumerate(found):
        expected = [step[rank // tp] for step in wanted]
        assert losses == pytest.approx(expected, rel=2e-3 if "bf16" in name else 2e-6)


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_consolidation_gives_the_whole_model(name: str) -> None:
    found = get_fp32_state_dict_from_zero_checkpoint(FOLDER, tag=name)
    _, wanted = plain(name)
    assert found.keys() == wanted.keys()
    close: dict[str, Any] = {"rtol": 0, "atol": 2e-3} if "bf16" in name else {"rtol": 1e-5, "atol": 1e-6}
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].float(), value, **close)


def test_a_rank_whose_file_is_missing_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "z1-dp2", tmp_path / "one")
    (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"the file of rank 0 is missing \(others: zero_pp_rank_1_mp_rank_01"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="one")
    folder = shutil.copytree(FOLDER / "z0", tmp_path / "first")
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="the file of model-parallel rank 0 is missing"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, tag="first")


def rewritten(name: str, folder: Path, change: Any) -> Path:
    """A copy whose model files tell something else about the parts."""
    copy = shutil.copytree(FOLDER / name, folder / "changed")
    for path in copy.glob("*model_states.pt"):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    return folder


def test_patterns_tell_where_there_is_no_map(tmp_path: Path) -> None:
    def without_map(content: Any) -> None:
        del content["universal_checkpoint_info"]["affine_map"]

    found = get_fp32_state_dict_from_zero_checkpoint(rewritten("z0", tmp_path, without_map), tag="changed")
    wanted = get_fp32_state_dict_from_zero_checkpoint(FOLDER, tag="z0")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


def _without_info(content: Any) -> None:
    del content["universal_checkpoint_info"]


def _unsupported(content: Any) -> None:
    content["universal_checkpoint_info"]["autotp_unsupported_parameter_patterns"] = {r"^lm_head\.weight$": "too odd"}


def _out_of_order(content: Any) -> None:
    ranks = content["universal_checkpoint_info"]["affine_map"]["params"][r"^lm_head\.weight$"]["ranks"]
    ranks[0]["pieces"][0]["source"] = [0, [1, 48]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_info, "2 ranks that shared layers, and does not say how"),
        (
            _unsupported,
            "lm_head.weight was cut over 2 ranks; the original says that it cannot be put together: too odd",
        ),
        (_out_of_order, "lm_head.weight was cut over 2 ranks; its parts do not lie in a box each"),
    ],
)
def test_parts_that_nobody_can_place_are_refused_by_name(tmp_path: Path, change: Any, words: str) -> None:
    folder = rewritten("z0", tmp_path, change)
    with pytest.raises(CheckpointError, match=words):
        get_fp32_state_dict_from_zero_checkpoint(folder, tag="changed")

"""A checkpoint of any tensor-parallel size loads into any other; the exported model is the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deepspeed
from tests.harness import run_ranks
from tests.parallel.tensor import checkpoint_runs as runs
from tests.parallel.tensor.models import LONG

pytest.importorskip("transformers")


def test_a_checkpoint_loads_at_another_size(tmp_path: Path) -> None:
    first = run_ranks(2, runs.save, str(tmp_path), 2, 2, timeout=120.0)
    exported = torch.load(tmp_path / "export" / "model.bin")
    assert exported["model.layers.0.self_attn.q_proj.weight"].shape == (64, 32)
    _is_found_by_its_names(tmp_path / "global_step2", num_model_ranks=2)
    for other_tp, other_world in ((1, 1), (2, 2)):
        for losses in run_ranks(other_world, runs.resume, str(tmp_path), other_tp, 2):
            assert losses == pytest.approx(first[0], rel=1e-5)


def _is_found_by_its_names(folder: Path, num_model_ranks: int) -> None:
    """The files that other libraries look for, one for each model-parallel rank, and what they count."""
    tools, whose = deepspeed.utils.zero_to_fp32, range(num_model_ranks)
    names = [Path(file).name for file in tools.get_optim_files(folder)]
    assert names == [f"zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt" for rank in whose]
    names = [Path(file).name for file in tools.get_model_state_files(folder)]
    assert names == [f"mp_rank_{rank:02d}_model_states.pt" for rank in whose]
    about = torch.load(folder / names[-1], weights_only=True)
    assert (about["mp_world_size"], about["dp_world_size"]) == (num_model_ranks, 1)


LAYOUTS = ((1, 1), (2, 2), (3, 3), (4, 4), (8, 8), (2, 4), (1, 2))
"""(ranks that share layers, all ranks)"""


@LONG
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("saved", LAYOUTS, ids=lambda layout: "tp{}of{}".format(*layout))
def test_any_size_loads_into_any_other_at_any_stage(tmp_path: Path, saved: tuple[int, int], stage: int) -> None:
    first = run_ranks(saved[1], runs.save, str(tmp_path), saved[0], stage, timeout=120.0)
    for position, (tp, world) in enumerate(LAYOUTS):
        now = (stage + position) % 4
        for losses in run_ranks(world, runs.resume, str(tmp_path), tp, now, timeout=120.0):
            assert losses == pytest.approx(first[0], rel=1e-5), (
                f"{saved} at stage {stage} into {(tp, world)} at stage {now}"
            )

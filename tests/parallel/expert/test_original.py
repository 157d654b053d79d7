"""Checkpoints with experts that DeepSpeed 0.19.8 wrote (`original/`, made by `make_original.py`) load and train on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from deepspeed.engine.engine import DeepSpeedEngine
from deepspeed.moe.layer import MoE
from deepspeed.utils.errors import CheckpointError
from tests.harness import run_ranks
from tests.parallel.expert.models import LONG, NUM_EXPERTS, WIDTH, FeedForward, Model
from tests.parallel.expert.runs import ADAM, CLIP, Trained, compare, plain, train

FOLDER = Path(__file__).parent / "original"
UNCLIPPED = 100.0
"""Without ZeRO the original's norm leaves out other ranks' experts, so its run with a clipped step equals nobody's."""


def expected(num_ranks: int, clip: float) -> Trained:
    """The third step of plain PyTorch."""
    found = plain(num_ranks, 2, is_adam=True, clip=clip)
    found.losses, found.norms = found.losses[2:], found.norms[2:]
    return found


@pytest.mark.parametrize(
    ("name", "ep", "stage", "clip"),
    [
        ("z1", 2, 2, CLIP),
        ("z0", 1, 3, UNCLIPPED),
        pytest.param("z0", 2, 0, UNCLIPPED, marks=LONG),
        pytest.param("z1", 1, 0, CLIP, marks=LONG),
        pytest.param("z2-ep1", 2, 3, CLIP, marks=LONG),
        pytest.param("z2-ep1", 1, 1, CLIP, marks=LONG),
    ],
)
def test_a_run_goes_on_as_plain_pytorch_would(name: str, ep: int, stage: int, clip: float) -> None:
    extra = {"optimizer": ADAM, "gradient_clipping": clip}
    compare(run_ranks(2, train, ep, 2, stage, extra, load=str(FOLDER / name)), expected(2, clip))


@LONG
@pytest.mark.parametrize(("ep", "stage"), [(4, 1), (2, 3)])
def test_a_run_of_four_ranks_in_bf16_goes_on(ep: int, stage: int) -> None:
    extra: dict[str, Any] = {"optimizer": ADAM, "bf16": {"enabled": True}}
    wanted = expected(4, CLIP)
    for found in run_ranks(4, train, ep, 2, stage, extra, load=str(FOLDER / "z2-bf16")):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-2)
        for name, value in found.weights.items():
            assert (value - wanted.weights[name]).abs().max() < 0.05, name


@pytest.mark.parametrize("name", ["z0", "z1", "z2-bf16", "z2-ep1"])
def test_consolidation_gives_every_expert_as_its_own_file_has_it(name: str) -> None:
    found = get_fp32_state_dict_from_zero_checkpoint(FOLDER / name)
    num = 0
    for path in (FOLDER / name / "two").glob("layer_*_expert_*"):
        for key, value in torch.load(path, weights_only=True).items():
            num += 1
            torch.testing.assert_close(found[key], value.float(), rtol=1e-2 if "bf16" in name else 0, atol=0)
    assert num == 2 * NUM_EXPERTS * 4 and len(found) == num + 6


def test_scripts_that_load_experts_themselves_get_those_of_their_rank() -> None:
    model = Model([MoE(WIDTH, FeedForward(), NUM_EXPERTS, ep_size=2) for _ in range(2)])
    for layer in model.layers:
        layer.deepspeed_moe.place.size, layer.deepspeed_moe.place.rank = 2, 1
    found: dict[str, torch.Tensor] = {}
    DeepSpeedEngine.load_moe_state_dict(str(FOLDER / "z1"), "two", found, False, model)
    assert set(found) == {name for name, _ in model.named_parameters() if ".deepspeed_experts." in name}
    last = torch.load(FOLDER / "z1/two/layer_1_expert_3_mp_rank_00_model_states.pt", weights_only=True)
    for name, value in last.items():
        assert torch.equal(found[name.replace("deepspeed_experts.3", "deepspeed_experts.1")], value)
    with pytest.raises(CheckpointError, match="old_moe_load=True"):
        DeepSpeedEngine.load_moe_state_dict(str(FOLDER / "z1"), "two", found, True, model)


def test_an_expert_whose_file_is_missing_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "z1", tmp_path / "copy") / "two"
    (folder / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"some of layers.1.deepspeed_moe.experts.deepspeed_experts. are missing"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "copy")

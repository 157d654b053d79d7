"""Weights that the original's AutoEP saved, under the plain model's names; files laid out as version 0.19.8 writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.utils.errors import CheckpointError
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.parallel.expert.hf import build

BLOCK = "model.layers.{}.mlp"


def write(model: nn.Module, folder: Path) -> None:
    """What two ranks of AutoEP write of a plain Mixtral without ZeRO; optimizer files aside."""
    folder.mkdir(parents=True)
    module, layers = {name: value.detach().clone() for name, value in model.state_dict().items()}, []
    for number in range(2):
        block = BLOCK.format(number)
        up, down = module.pop(f"{block}.experts.gate_up_proj"), module.pop(f"{block}.experts.down_proj")
        router = module.pop(f"{block}.gate.weight")
        module |= {f"{block}.router.gate.weight": router, f"{block}.gate.gate.weight": router}
        layers.append(
            {"moe_layer_id": number, "module_path": block, "num_experts": 4, "expert_key_prefix": f"{block}.experts"}
        )
        for e in range(4):
            w1, w3 = up[e].chunk(2)
            each = {"w1": w1, "w2": down[e], "w3": w3}
            values = {f"{block}.experts.{name}.{e}": value.clone() for name, value in each.items()}
            torch.save(values, folder / f"layer_{number}_expert_{e}_mp_rank_00_model_states.pt")
    state = {
        "module": module, "buffer_names": [], "param_shapes": None, "dp_world_size": 2, "mp_world_size": 1, "global_steps": 3,
        "shared_params": {f"{BLOCK.format(0)}.gate.gate.weight": f"{BLOCK.format(0)}.router.gate.weight"},
        "ds_autoep_layers": layers, "ds_version": "0.19.8", "ds_config": {},
    }  # fmt: skip
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    (folder.parent / "latest").write_text(folder.name)


def load(rank: int, world_size: int, folder: str, ep: int) -> dict[str, Tensor]:
    model = build("mixtral")
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    config = make_config(2, micro=2, expert_parallel={"enabled": True, "autoep_size": ep})
    with engine_of(model, config) as engine:
        engine.load_checkpoint(folder)
        return {
            name: deepspeed.utils.safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()
        }


@pytest.mark.parametrize("ep", [1, 2])
def test_every_weight_of_autoep_is_the_plain_models(ep: int, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = build("mixtral")
    write(model, tmp_path / "three")
    expected = dict(model.named_parameters())
    for rank, found in enumerate(run_ranks(2, load, str(tmp_path), ep)):
        assert set(found) == set(expected)
        for name, value in found.items():
            whole = expected[name]
            part = whole if value.shape == whole.shape else whole.chunk(ep)[rank]
            assert torch.equal(value, part), name


def test_an_expert_of_autoep_whose_file_is_missing_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write(build("mixtral"), tmp_path / "three")
    (tmp_path / "three" / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"layer_1_expert_2_mp_rank_00_model_states.pt is missing: expert 2 of model"
    ):
        deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))

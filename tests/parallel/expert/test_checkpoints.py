"""Checkpoints with experts: each expert once on disk, loaded by any other placement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.parallel.expert import lists
from tests.parallel.expert.hf import build
from tests.parallel.expert.models import LONG, NUM_EXPERTS, set_values
from tests.parallel.expert.runs import ADAM, compare, plain, train


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # (ranks, ep, ZeRO stage)
        ((2, 2, 0), (2, 1, 3)),
        ((2, 1, 2), (2, 2, 0)),
        pytest.param((2, 2, 3), (2, 2, 1), marks=LONG),
        pytest.param((4, 2, 1), (4, 4, 2), marks=LONG),
        pytest.param((4, 4, 0), (4, 2, 3), marks=LONG),
    ],
)
def test_a_run_goes_on_at_another_placement_as_if_it_had_not_stopped(
    before: tuple[int, int, int], after: tuple[int, int, int], tmp_path: Path
) -> None:
    for optimizer, is_adam in (({}, False), ({"optimizer": ADAM}, True)):
        folder = str(tmp_path / str(is_adam))
        ranks, ep, stage = before
        run_ranks(ranks, train, ep, 2, stage, optimizer, save=folder)
        ranks, ep, stage = after
        found = run_ranks(ranks, train, ep, 2, stage, optimizer, load=folder)
        expected = plain(ranks, 2, is_adam=is_adam)
        expected.losses, expected.norms = expected.losses[2:], expected.norms[2:]
        compare(found, expected)


def test_every_expert_is_on_disk_once_under_its_number_in_the_whole_model(tmp_path: Path) -> None:
    run_ranks(2, train, 2, 2, 1, save=str(tmp_path))
    folder = tmp_path / (tmp_path / "latest").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    experts = {
        int(name.split("deepspeed_experts.")[1].split(".")[0])
        for name in manifest["parameters"]
        if "deepspeed_experts" in name
    }
    assert experts == set(range(NUM_EXPERTS))


@pytest.mark.parametrize(
    ("file_name", "kind"),
    [("model.safetensors", "fused"), ("pytorch_model.bin", "fused"), ("model.safetensors", "list")],
)
def test_the_exported_model_has_all_experts_under_the_plain_models_names(
    file_name: str, kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    run_ranks(2, export_untrained, str(tmp_path), file_name, kind)
    expected = dict(untrained(kind).state_dict())
    path = tmp_path / file_name
    found = load_file(path) if file_name.endswith("safetensors") else torch.load(path)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def untrained(kind: str) -> nn.Module:
    if kind == "fused":
        return build("qwen3_moe")
    model = lists.Model("Routed")  # every expert under a name of its own
    set_values(model)
    return model


def export_untrained(rank: int, world_size: int, folder: str, file_name: str, kind: str) -> None:
    config = make_config(
        3,
        micro=1,
        expert_parallel={"enabled": True, "autoep_size": 2},
        zero={"stage3_gather_16bit_weights_on_model_save": True},
    )
    with engine_of(untrained(kind), config) as engine:
        assert engine.save_16bit_model(folder, file_name)

"""Which layers of `MoE`'s experts are cut over ranks that share layers."""

from __future__ import annotations

import pytest
from torch import nn

from deepspeed.engine.cut_experts import decide
from deepspeed.moe.layer import MoE
from deepspeed.parallel.tensor.choose import Chosen, Decision
from deepspeed.parallel.tensor.rules import Action
from deepspeed.utils.errors import DeepSpeedConfigError
from tests.parallel.expert.models import FeedForward


def moe(expert: nn.Module, *, asks: bool = True) -> nn.Module:
    return nn.ModuleDict(
        {"moe": MoE(8, expert, num_experts=2, use_residual=True, enable_expert_tensor_parallelism=asks)}
    )


def decided(model: nn.Module, source: str = "structure", *names: str) -> dict[str, str]:
    chosen = decide(model, Chosen(source, {name: Decision(Action.COLUMN) for name in names}))
    return {name: decision.action.name for name, decision in chosen.decisions.items()}


EXPERT = "moe.deepspeed_moe.experts.deepspeed_experts"


def test_experts_are_cut_where_their_layer_asks_for_it() -> None:
    cut = {
        f"{at}.{name}": kind
        for at in (f"{EXPERT}.0", f"{EXPERT}.1", "moe.mlp")
        for name, kind in (("up", "COLUMN"), ("down", "ROW"))
    }
    structure = ("head", "moe.coefficient", "moe.deepspeed_moe.gate.wg", f"{EXPERT}.0.up", "moe.mlp.up", "moe.mlp.down")
    assert decided(moe(FeedForward()), "structure", *structure) == {"head": "COLUMN", **cut}
    assert decided(moe(FeedForward(), asks=False), "structure", *structure) == {"head": "COLUMN"}
    assert decided(moe(nn.Linear(8, 8)))[f"{EXPERT}.1"] == "COLUMN_GATHERED"


def test_what_a_partition_config_says_of_experts_holds_but_gates_stay_whole() -> None:
    told = ("moe.deepspeed_moe.gate.wg", f"{EXPERT}.0.down")
    found = decided(moe(FeedForward(), asks=False), "partition_config", *told)
    assert found == {f"{EXPERT}.0.down": "COLUMN"}


@pytest.mark.parametrize(
    ("expert", "text"),
    [
        (nn.Conv1d(8, 8, 1), "has no nn.Linear to be cut"),
        (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 8)), "cannot be told"),
    ],
)
def test_experts_whose_structure_says_nothing_are_refused_by_name(expert: nn.Module, text: str) -> None:
    with pytest.raises(DeepSpeedConfigError, match=text):
        decided(moe(expert))

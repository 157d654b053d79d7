"""With `sequence_parallel_regions` each rank has some tokens between layers; loss, gradients and norm are one process's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.parallel.tensor.apply import draw
from deepspeed.parallel.tensor.choose import Wishes
from deepspeed.parallel.tensor.collectives import TensorGroup
from tests.harness import run_ranks
from tests.parallel.tensor import runs
from tests.parallel.tensor.models import LONG, batch, small
from tests.parallel.tensor.test_training import check

pytest.importorskip("transformers")

REGIONS = {"sequence_parallel_regions": True}
FAMILIES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("llama", {}, 1),
    ("qwen3", {"num_key_value_heads": 1}, 3),
    ("gpt_neox", {"num_key_value_heads": "none", "head_dim": "none"}, 0),
)


def compare_all(rank: int, world_size: int) -> list[dict[str, float]]:
    return [runs.compare(rank, world_size, family, 2, stage, changes, REGIONS) for family, changes, stage in FAMILIES]


def test_loss_gradients_and_norm_are_one_processs() -> None:
    for found in run_ranks(2, compare_all, timeout=200.0):
        check(found)


@LONG
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_neox", "bloom"])
def test_every_family_is_one_processs(family: str, stage: int, ranks: int) -> None:
    bare = {"num_key_value_heads": "none", "head_dim": "none"}
    check(
        run_ranks(ranks, runs.compare, family, ranks, stage, bare if family in ("gpt_neox", "bloom") else {}, REGIONS)
    )


def watch_a_layer(rank: int, world_size: int) -> dict[str, Any]:
    """By whether there are regions: bytes kept for backward and sent, of one layer more; a checkpointed loss, and another's."""
    found: dict[str, Any] = {"kept": {}, "sent": {}, "checkpointed": {}}
    for section in ({}, REGIONS):
        kept = [kept_nbytes(layers, section) for layers in (1, 2)]
        sent = [runs.count_bytes(rank, world_size, layers, section) for layers in (1, 2)]
        found["kept"][bool(section)], found["sent"][bool(section)] = kept[1] - kept[0], sent[1] - sent[0]
    for is_reentrant in (False, True):
        engine = started("llama", REGIONS, {"use_reentrant": is_reentrant})
        loss = engine(**batch(2)).loss
        engine.backward(loss)
        engine.step()
        found["checkpointed"][is_reentrant] = (float(loss.detach()), engine.get_global_grad_norm())
        engine.eval()
        with torch.no_grad():  # nothing is divided, so any length will do
            found["evaluated"] = float(engine(**batch(2, length=7)).loss)
        engine.destroy()
    return found


def started(family: str, section: dict[str, Any], checkpointing: Any = None, **changes: Any) -> Any:
    model: Any = small(family, **changes)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    asked = runs.config(2, 1)
    asked["tensor_parallel"].update(section)
    return deepspeed.initialize(model=model, config=asked)[0]


def kept_nbytes(layers: int, section: dict[str, Any]) -> int:
    """Memory that autograd keeps from a forward, weights aside."""
    engine = started("llama", section, num_hidden_layers=layers, num_key_value_heads=4)
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = engine(**batch(2))
    found = sum(kept.values())
    engine.backward(output.loss)
    engine.destroy()
    return found


def test_a_layer_keeps_less_and_sends_as_much_and_checkpoints_and_evaluates() -> None:
    plain, inputs = small("llama"), batch(2)
    loss, _, norm = runs.plain_step(plain, inputs)
    at_first: Any = small("llama")
    for found in run_ranks(2, watch_a_layer, timeout=200.0):
        whole = 2 * 8 * 32 * 4
        assert found["kept"][True] < found["kept"][False] - 2 * whole
        norms = 2 * 32 * 4  # whose gradients are summed
        assert found["sent"][True] - found["sent"][False] == norms
        for own_loss, own_norm in found["checkpointed"].values():
            assert own_loss == pytest.approx(loss, rel=1e-6)
            assert own_norm == pytest.approx(norm, rel=1e-6)
        assert found["evaluated"] < float(at_first(**batch(2, length=7)).loss.detach())


def refuse(rank: int, world_size: int) -> None:
    engine = started("llama", REGIONS)
    with pytest.raises(
        deepspeed.utils.errors.DeepSpeedError, match=r"\(2, 7, 32\), and 2 ranks do not divide their tokens"
    ):
        engine(**batch(2, length=7))
    engine.destroy()
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts is experts.*, which is not shown to work"):
        started("mixtral", REGIONS, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"q_proj is column, outputs gathered, which is not shown to work"):
        started("olmo2", REGIONS)
    with pytest.raises(ValueError, match=r"Phi3ForCausalLM has no list of blocks that all have layers to cut"):
        started("phi3", REGIONS)


def test_what_cannot_be_divided_is_refused_by_name() -> None:
    run_ranks(2, refuse)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [(Wishes(has_regions=True, overlaps=True), "tp_overlap_comm"), (Wishes(has_regions=True, is_part=True), "stages")],
)
def test_what_it_does_not_go_with_is_refused_by_name(wishes: Wishes, words: str) -> None:
    with pytest.raises(ValueError, match=rf"sequence_parallel_regions = true beside .*{words}"):
        draw(small("llama"), TensorGroup(None, 0, 2), wishes)

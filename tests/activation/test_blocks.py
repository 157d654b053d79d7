"""Blocks that recompute: found in the model, bit-equal to those that keep everything, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.activation.blocks import Recompute, blocks_of, checkpoint_blocks, find_blocks
from tests.engine.runs import engine_of, make_config, whole_weights
from tests.harness import run_ranks
from tests.models import Mlp, Regression, TinyGpt, example_module, make_batches, rank_share, to_dtype


class Dropping(TinyGpt):
    """A GPT with dropout after each block's MLP."""

    def __init__(self) -> None:
        super().__init__(tied=True, width=32, depth=3)
        for layer in self.blocks:
            layer.mlp.append(nn.Dropout(0.2))


def steps(rank: int, world_size: int, stage: int, is_bf16: bool, section: dict[str, Any], is_plain: bool) -> Any:
    torch.manual_seed(0)
    model = Dropping()
    batches = make_batches(model, num_steps=3, accumulation=1, samples=4)
    config = make_config(stage, micro=2, bf16={"enabled": is_bf16}, activation_checkpointing=section)
    losses = []
    with engine_of(model, config) as engine:
        torch.manual_seed(rank)
        for (batch,) in batches:
            loss = engine(*to_dtype(rank_share(batch, rank, world_size), engine.get_data_types()[0]))
            loss.backward() if is_plain else engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, whole_weights(engine)


@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recomputing_blocks_changes_no_bit(stage: int, is_bf16: bool) -> None:
    losses, weights = run_ranks(2, steps, stage, is_bf16, {}, False)[0]
    for section in (
        {"recompute": "full"},
        {"recompute": "selective"},
        {"recompute": "full", "cpu_checkpointing": True},
    ):
        again, weights_again = run_ranks(2, steps, stage, is_bf16, section, stage % 2 == 1)[0]
        assert again == losses
        assert all(torch.equal(weights_again[name], value) for name, value in weights.items())


def kept_nbytes(model: nn.Module, *batch: Tensor) -> int:
    """Bytes that autograd keeps for backward, but for parameters and the batch; found by torch's own hooks."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *batch)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*batch)
    del loss
    return sum(found.values())


def test_a_full_checkpoint_keeps_the_inputs_of_blocks_as_theory_says() -> None:
    example = example_module()
    B, T, C, L = 4, 64, 64, 4
    model = example.Gpt(example.GptConfig(vocab=64, seq=T, width=C, layers=L, heads=2))
    x = torch.randint(64, (B, T))
    y = x.clone()
    without = kept_nbytes(model, x, y)
    blocks = checkpoint_blocks(model, "full")
    with_ = kept_nbytes(model, x, y)
    blocks.detach()
    stream = B * T * C * 4
    saved_by_block = (without - with_) / L / stream
    # Saved by a block beyond its input, in units of the stream [B, T, C]: normalised copies 2 (LayerNorm also saves its
    # input, the second one's is the sum in the middle: 1), v 1, q and k rotated 2, attention's output 1 and as the
    # projection's input 1, MLP: 4 before GELU and 4 after; the rotation saves cos and sin, shared by samples and heads.
    # qkv's output lives as long as v, a view of it: 2 more. Row statistics are two numbers per row and norm.
    statistics = 2 * 2 / C + 1 / (C / 2)
    assert saved_by_block == pytest.approx(18 + statistics, rel=0.03)


def test_selective_keeps_less_than_everything_and_more_than_the_inputs() -> None:
    model = TinyGpt(width=32, depth=3)
    ((batch,),) = make_batches(model, num_steps=1, accumulation=1, samples=4)
    sizes = {}
    for recompute in Recompute:
        blocks = checkpoint_blocks(model, recompute)
        sizes[recompute] = live_after_forward(model, batch)
        blocks.detach()
    assert sizes[Recompute.FULL] < sizes[Recompute.SELECTIVE] < sizes[Recompute.NONE]


def live_after_forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> int:
    """Bytes of live storages that a forward leaves."""
    from tests.zero.sharded import storages

    before = storages()
    loss = model(*batch)
    after = storages()
    del loss
    return sum(nbytes for pointer, nbytes in after.items() if pointer not in before)


class Lists(Regression):
    """Two lists of blocks, one in a wrapper, and one with a stranger in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.single = nn.Sequential(nn.Linear(4, 4), nn.GELU())


def test_blocks_are_the_like_elements_of_lists() -> None:
    model = Lists()
    assert find_blocks(model) == [*model.inner.layers, model.tower[0], model.tower[2]]
    gpt = TinyGpt(depth=2)
    assert find_blocks(gpt) == list(gpt.blocks), "of nested lists the outermost"


def test_a_model_may_be_the_list_of_its_blocks() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(3)]
    assert find_blocks(nn.Sequential(nn.Embedding(8, 4), *blocks)) == blocks


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        blocks_of(nn.Linear(2, 2))
    run_ranks(2, refused)


def refused(rank: int, world_size: int) -> None:
    config = make_config(0, micro=1, activation_checkpointing={"recompute": "full"})
    with pytest.raises(ValueError, match="Linear has no repeated blocks"), engine_of(nn.Linear(4, 4), config):
        pass


def test_a_plan_is_applied_changed_and_taken_away() -> None:
    model = Mlp(depth=3)
    blocks = blocks_of(model)
    blocks.apply([Recompute.FULL, Recompute.NONE, Recompute.SELECTIVE])
    assert ["forward" in block.__dict__ for block in model.blocks] == [True, False, True]
    assert repr(blocks) == "Blocks(3: 1 full, 1 none, 1 selective)"
    blocks.apply([Recompute.NONE] * 3)
    assert not any("forward" in block.__dict__ for block in model.blocks)
    with pytest.raises(ValueError, match="the plan has 1 entries, the model 3 blocks"):
        blocks.apply([Recompute.FULL])


def destroyed(rank: int, world_size: int) -> bool:
    model = TinyGpt()
    with engine_of(model, make_config(3, micro=1, activation_checkpointing={"recompute": "full"})):
        assert all("forward" in block.__dict__ for block in model.blocks)
    return any("forward" in block.__dict__ for block in model.blocks)


def test_a_destroyed_engine_leaves_the_model_as_it_was() -> None:
    assert run_ranks(2, destroyed) == [False, False]


def test_budget_and_fixed_choice_do_not_go_together() -> None:
    section = {"recompute": "full", "memory_budget_gb": 1}
    with pytest.raises(ValueError, match="the budget chooses what is recomputed"):
        deepspeed.checkpointing.configure(None, {"train_batch_size": 1, "activation_checkpointing": section})

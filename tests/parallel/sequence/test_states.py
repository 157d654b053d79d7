"""Beside one backward: weights after steps, adapters, recomputed blocks, several forwards, and checkpoints of any division."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence import tile_model
from tests.harness import run_ranks
from tests.parallel.sequence import runs
from tests.parallel.sequence.test_training import WHEN_LONG

STEPS, ACCUMULATION = 3, 2
KINDS = ("full", "lora", "recomputed", "tiled")
EVERY_DAY = ((1, "lora"), (1, "recomputed"), (3, "full"), (3, "tiled"))
SIZES = (1, 2, 3, 4, 8)


def make(kind: str) -> nn.Module:
    """A model: whole, with adapters, with recomputed blocks, or in tiles."""
    model = runs.tiny_model()
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(2)
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    elif kind == "recomputed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif kind == "tiled":
        tile_model(model, mlp_tokens=5, loss_tokens=3)
    return model


def batches() -> list[list[runs.Batch]]:
    """By step and micro-batch, of other lengths and kinds."""
    kinds = ("packed", "plain")
    return [
        [runs.batch_of(kinds[micro], 12 + 2 * micro, 2, seed=10 * step + micro) for micro in range(ACCUMULATION)]
        for step in range(2 * STEPS)
    ]


def plain(kind: str) -> dict[str, Tensor]:
    """Weights after training in one process; both micro-batches of a step are forwarded before either backward."""
    model = make("full" if kind == "tiled" else kind)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, eps=1e-4, weight_decay=0.0)
    for step in batches()[:STEPS]:
        for batch in step:
            (runs.loss_of(model, batch) / ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def config(stage: int) -> dict[str, Any]:
    """AdamW with clipping."""
    return runs.config_of(
        stage,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clipping=0.5,
        optimizer={"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.0, "torch_adam": True}},
    )


def steps(engine: Any, which: list[list[runs.Batch]], rank: int, size: int) -> list[float]:
    """Train; each micro-batch's loss, weighted over the ranks."""
    losses = []
    for micro_batches in which:
        for batch in micro_batches:
            part = runs.cut(batch, rank, size)
            loss = engine(**part, labels=part["shift_labels"]).loss
            engine.backward(loss)
            engine.step()
            count = (part["shift_labels"] != -100).sum()
            # A part without targets has a mean of nothing.
            sums = torch.stack([loss.detach().nan_to_num() * count, count.float()])
            torch.distributed.all_reduce(sums)
            losses.append(float(sums[0] / sums[1]))
    return losses


def start(model: nn.Module, stage: int, size: int) -> Any:
    """An engine whose ranks share sequences."""
    mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", size, micro_batch_size=2)
    return deepspeed.initialize(model=model, mpu=mpu, config=config(stage))[0]


def stop(engine: Any) -> None:
    """And leave nothing."""
    engine.destroy()
    UlyssesSPAttentionHF.unregister()
    parallel_state_sp.destroy_sequence_parallel()


def train(rank: int, world: int, kind: str, stage: int) -> dict[str, Tensor]:
    """Weights after training over parts."""
    engine = start(make(kind), stage, world)
    steps(engine, batches()[:STEPS], rank, world)
    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            with deepspeed.zero.GatheredParameters([param]):
                found[name] = param.detach().clone()
    stop(engine)
    return found


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        pytest.param(stage, kind, marks=[] if (stage, kind) in EVERY_DAY else WHEN_LONG)
        for stage in (1, 3)
        for kind in KINDS
    ],
)
def test_weights_after_steps_equal_one_process(stage: int, kind: str) -> None:
    if kind == "lora":
        pytest.importorskip("peft")
    expected = plain(kind)
    for found in run_ranks(2, train, kind, stage):
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def two_batches() -> list[runs.Batch]:
    """Whole rows and padding in front, with as many targets on each rank, so that one weight holds for both losses."""
    first, second = runs.batch_of("plain", 12, 2, seed=1), runs.batch_of("plain", 12, 2, seed=2)
    second["position_ids"][:, 4:] -= 4
    return [first, second]


def two_forwards(rank: int, world: int) -> dict[str, Tensor]:
    """Gradients of the sum of two forwards with recomputed blocks, of which the first is recomputed last."""
    engine = start(make("recomputed"), 2, world)
    first, second = (runs.cut(batch, rank, world) for batch in two_batches())
    losses = [engine(**part, labels=part["shift_labels"]).loss for part in (first, second)]
    engine.backward(losses[0] + losses[1])
    found = runs.gradients_of(engine)
    engine.step()
    stop(engine)
    return found


def test_a_block_that_runs_again_has_the_inputs_of_its_own_forward() -> None:
    _, expected = runs.plain(make("full"), two_batches())
    found = run_ranks(2, two_forwards)[0]
    assert runs.largest_error(found, expected) < 1e-5


def save(rank: int, world: int, folder: str, stage: int) -> list[float]:
    """Train, save, train on: the losses after the save."""
    size = world
    engine = start(make("full"), stage, size) if world > 1 else alone(stage)
    steps(engine, batches()[:STEPS], rank, size)
    engine.save_checkpoint(folder)
    after = steps(engine, batches()[STEPS:], rank, size)
    stop(engine)
    return after


def alone(stage: int) -> Any:
    """Whole sequences in one process."""
    return deepspeed.initialize(model=make("full"), config=config(stage))[0]


def load(rank: int, world: int, folder: str, stage: int) -> list[float]:
    """Load, and train on."""
    engine = start(make("full"), stage, world) if world > 1 else alone(stage)
    engine.load_checkpoint(folder)
    after = steps(engine, batches()[STEPS:], rank, world)
    stop(engine)
    return after


@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), (1, 0)), ((1, 0), (2, 3))])
def test_a_checkpoint_continues_with_any_number_of_ranks_per_sequence(
    saved: tuple[int, int], loaded: tuple[int, int], tmp_path: Path
) -> None:
    expected = run_ranks(saved[0], save, str(tmp_path), saved[1])[0]
    found = run_ranks(loaded[0], load, str(tmp_path), loaded[1])[0]
    assert found == pytest.approx(expected, rel=1e-5)


@WHEN_LONG
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_a_checkpoint_of_any_size_and_stage_continues_at_any_other(size: int, stage: int, tmp_path: Path) -> None:
    expected = run_ranks(size, save, str(tmp_path), stage)[0]
    for i, other in enumerate(SIZES):
        found = run_ranks(other, load, str(tmp_path), (stage + i + 1) % 4)[0]
        assert found == pytest.approx(expected, rel=1e-5), f"on {other} ranks"

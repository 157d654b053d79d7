"""A budget: the ladder, the lowest rung that fits, and an engine that keeps to it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from deepspeed.activation.blocks import Recompute
from deepspeed.memory.budget import choose_plan, ladder
from deepspeed.memory.estimator import Estimator
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.long import IS_LONG
from tests.models import TinyGpt, make_batches, rank_share

SECTION = "activation_checkpointing"


def test_the_ladder_climbs_from_nothing_to_everything() -> None:
    letters = {Recompute.NONE: ".", Recompute.SELECTIVE: "s", Recompute.FULL: "F"}
    assert ["".join(letters[r] for r in plan) for plan in ladder(3)] == [
        "...",
        "s..",
        "ss.",
        "sss",
        "Fss",
        "FFs",
        "FFF",
    ]


def gpt() -> TinyGpt:
    return TinyGpt(width=64, depth=4)


def peaks(config: dict[str, Any], samples: int) -> list[int]:
    model = gpt()
    batch = model.example(samples, 0, torch.Generator())
    estimator = Estimator(model, batch, device_type="cpu")
    return [estimator.estimate(config, world_size=2, plan=plan).peak_nbytes for plan in ladder(4)]


def test_the_chosen_rung_fits_and_the_one_below_does_not() -> None:
    config = make_config(2, micro=64)
    found = peaks(config, 64)
    # Not strictly falling: where the last block recomputes, too, its recomputation comes on top at the start of backward.
    assert all(lower < 1.02 * higher for higher, lower in itertools.pairwise(found))
    assert found[0] > 1.5 * found[-1]
    model = gpt()
    batch = model.example(64, 0, torch.Generator())
    for budget in found if IS_LONG else (found[0], found[len(found) // 2], found[-1]):
        chosen, estimate = choose_plan(model, config, batch, {}, world_size=2, budget_nbytes=budget, device_type="cpu")
        assert estimate.peak_nbytes == found[chosen] <= budget
        assert chosen == 0 or found[chosen - 1] > budget
    with pytest.raises(ValueError, match="with every block recomputed whole a rank still needs"):
        choose_plan(model, config, batch, {}, world_size=2, budget_nbytes=found[-1] - 1, device_type="cpu")


def train(rank: int, world_size: int, stage: int, budget_nbytes: int | None) -> tuple[list[float], str]:
    section = {} if budget_nbytes is None else {"memory_budget_gb": budget_nbytes / 2**30}
    torch.manual_seed(0)
    model = gpt()
    batches = make_batches(model, num_steps=2, accumulation=1, samples=128)
    with engine_of(model, make_config(stage, micro=64, **{SECTION: section})) as engine:
        with torch.no_grad():
            engine(*rank_share(batches[0][0], rank, world_size))  # an evaluation first does not settle anything
        losses = []
        for (batch,) in batches:
            loss = engine(*rank_share(batch, rank, world_size))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses, repr(engine._recomputation.blocks)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_recomputes_as_little_as_fits_and_changes_no_bit(stage: int) -> None:
    config = make_config(stage, micro=64)
    found = peaks(config, 64)
    plain, _ = run_ranks(2, train, stage, None)[0]
    for budget, blocks in ((found[0], "Blocks(4: 4 none)"), (found[-1], "Blocks(4: 4 full)")):
        # GiB are written with few digits: a little more than the prediction.
        (losses, chosen), (_, chosen_by_other) = run_ranks(2, train, stage, budget + 1000)
        assert chosen == chosen_by_other == blocks
        assert losses == plain

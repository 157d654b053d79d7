"""Training runs that save and that continue, as functions that worker processes call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspeed.zero.checkpoint_flats import states
from tests.engine.runs import engine_of, make_config, whole_weights
from tests.models import Batch, build, make_batches, rank_share, to_dtype, total_loss

SAMPLES = 24
"""Per micro-batch over all ranks: divisible by every world size of the tests."""


@dataclass
class Ran:
    """Losses of one rank, whole fp32 weights and optimizer states, and what loading gave."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    states: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)
    loaded: tuple[str | None, dict[str, Any] | None] = (None, None)


def config_of(stage: int, world_size: int, **extra: Any) -> dict[str, Any]:
    """A stage's configuration, with a schedule."""
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 3e-3, "warmup_type": "linear"}}
    return make_config(stage, micro=SAMPLES // world_size, **{"scheduler": schedule, **extra})


def batches_of(model: Any, num_steps: int) -> list[Any]:
    """The same batches for every run."""
    return make_batches(model, num_steps=num_steps, accumulation=1, samples=SAMPLES)


def train(engine: Any, batches: Sequence[Sequence[Batch]], rank: int, world_size: int) -> list[float]:
    """One step per entry; this rank's losses."""
    losses = []
    for micro_batches in batches:
        for batch in micro_batches:
            share = to_dtype(rank_share(batch, rank, world_size), engine.get_data_types()[0])
            loss = total_loss(engine(*share))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def own_states(engine: Any) -> dict[tuple[str, str, int], Tensor]:
    """This rank's pieces of optimizer states: (kind, parameter, first element) -> values."""
    return {
        (flat.kind, span.name, span.in_param): flat.read(span.at, span.numel).clone()
        for flat in states(engine.optimizer, engine.mesh)
        for span in flat.spans
    }


def save_and_go_on(
    rank: int,
    world_size: int,
    folder: Path,
    stage: int,
    name: str = "mlp",
    *,
    num_before: int = 3,
    num_after: int = 2,
    **extra: Any,
) -> Ran:
    """Train, save, and train on: what a resumed run has to equal. Weights and states are those of the save."""
    model = build(name)
    batches = batches_of(model, num_before + num_after)
    with engine_of(model, config_of(stage, world_size, **extra)) as engine:
        train(engine, batches[:num_before], rank, world_size)
        engine.save_checkpoint(str(folder), client_state={"step": num_before, "tensor": torch.arange(3)})
        ran = Ran(weights=whole_weights(engine), states=own_states(engine))
        ran.losses = train(engine, batches[num_before:], rank, world_size)
        engine.wait_for_checkpoint()
    return ran


def resume(
    rank: int,
    world_size: int,
    folder: Path,
    stage: int,
    name: str = "mlp",
    *,
    num_before: int = 3,
    num_after: int = 2,
    load: Any = None,
    **extra: Any,
) -> Ran:
    """Another model, loaded, and trained on. Weights and states are those right after loading."""
    model = build(name)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.add_(1)
    batches = batches_of(model, num_before + num_after)
    with engine_of(model, config_of(stage, world_size, **extra)) as engine:
        ran = Ran(loaded=engine.load_checkpoint(str(folder), **(load or {})))
        ran.weights, ran.states = whole_weights(engine), own_states(engine)
        ran.losses = train(engine, batches[num_before:], rank, world_size)
    return ran


def whole_states(ran: Sequence[Ran]) -> dict[tuple[str, str], Tensor]:
    """Every optimizer state whole, put together from all ranks' pieces."""
    pieces: dict[tuple[str, str], dict[int, Tensor]] = {}
    for rank in ran:
        for (kind, name, start), values in rank.states.items():
            pieces.setdefault((kind, name), {})[start] = values
    return {key: torch.cat([found[start] for start in sorted(found)]) for key, found in pieces.items()}


def assert_same(actual: Sequence[Ran], expected: Sequence[Ran]) -> None:
    """Weights and optimizer states equal bit for bit."""
    for got, want in (
        (actual[0].weights, expected[0].weights),
        (whole_states(actual), whole_states(expected)),
    ):
        assert got.keys() == want.keys()
        for key, value in want.items():
            assert torch.equal(got[key], value), key  # type: ignore[index]

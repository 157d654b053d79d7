"""Every way to spell a training step gives the step of plain PyTorch: one program per way, at every ZeRO stage."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.utils.errors import TrainingStateError
from tests.engine.runs import EPS, LR, engine_of, make_config, whole_weights
from tests.harness import run_ranks
from tests.models import Batch, build, make_batches, rank_share
from tests.oracle import Trained, assert_close_weights, train_plain

STAGES = (0, 1, 2, 3)
SAMPLES = 4
EVEN, UNEVEN = (3, 3, 3), (3, 1, 2)
"""Micro-batches of each step."""

Program = Callable[[Any, Sequence[Batch]], None]


# ------------------------------------------------------- steps with an engine that counts to 3 micro-batches itself


def own_count(engine: Any, batches: Sequence[Batch]) -> None:
    """Lightning, and the documentation: `step` after every micro-batch."""
    for batch in batches:
        engine.backward(engine(*batch))
        engine.step()


def plain_backward(engine: Any, batches: Sequence[Batch]) -> None:
    """`loss.backward()`, scaled by the caller."""
    for batch in batches:
        (engine(*batch) / len(batches)).backward()
        engine.step()


def boundary_flag(engine: Any, batches: Sequence[Batch]) -> None:
    """Accelerate and Transformers: a flag before each backward, `step` at boundaries; they come early and late."""
    for i, batch in enumerate(batches):
        loss = engine(*batch)
        engine.set_gradient_accumulation_boundary(is_boundary=i == len(batches) - 1)
        engine.backward(loss / len(batches), scale_wrt_gas=False)
    engine.step()


# ---------------------------------------------------------------------- steps with an engine of one micro-batch a step


def no_sync(engine: Any, batches: Sequence[Batch]) -> None:
    """All but the last backward inside of `no_sync`, one context for each."""
    for i, batch in enumerate(batches):
        with engine.no_sync() if i < len(batches) - 1 else contextlib.nullcontext():
            engine.backward(engine(*batch) / len(batches))
    engine.step()


def no_sync_once(engine: Any, batches: Sequence[Batch]) -> None:
    """As above, in one context."""
    with engine.no_sync():
        for batch in batches[:-1]:
            engine.backward(engine(*batch) / len(batches))
    engine.backward(engine(*batches[-1]) / len(batches))
    engine.step()


def coalesced(engine: Any, batches: Sequence[Batch]) -> None:
    """One reduction for several backward passes."""
    with engine.coalesce_grad_reduction():
        for batch in batches:
            engine.backward(engine(*batch) / len(batches))
    engine.step()


def explicit_reduction(engine: Any, batches: Sequence[Batch]) -> None:
    """`allreduce_gradients` by hand after each backward."""
    for batch in batches:
        engine.backward(engine(*batch) / len(batches))
        engine.allreduce_gradients()
    engine.step()


def several_backwards(engine: Any, batches: Sequence[Batch]) -> None:
    """A backward for each of several losses, then one step."""
    for batch in batches:
        engine.backward(engine(*batch) / len(batches))
    engine.step()


def several_forwards(engine: Any, batches: Sequence[Batch]) -> None:
    """Several forwards, one backward of the mean."""
    engine.backward(torch.stack([engine(*batch) for batch in batches]).mean())
    engine.step()


def forwards_then_backwards(engine: Any, batches: Sequence[Batch]) -> None:
    """All forwards, then all backward passes, last first, plain."""
    losses = [engine(*batch) / len(batches) for batch in batches]
    for loss in reversed(losses):
        loss.backward()
    engine.step()


def retained_graph(engine: Any, batches: Sequence[Batch]) -> None:
    """Two backward passes through one graph, half of the loss each."""
    for batch in batches:
        half = engine(*batch) / (2 * len(batches))
        engine.backward(half, retain_graph=True)
        engine.backward(half)
    engine.step()


def retained_graph_plain(engine: Any, batches: Sequence[Batch]) -> None:
    """The same with `loss.backward()`."""
    for batch in batches:
        half = engine(*batch) / (2 * len(batches))
        half.backward(retain_graph=True)
        half.backward()
    engine.step()


def evaluation_between(engine: Any, batches: Sequence[Batch]) -> None:
    """Evaluation between micro-batches, and between a forward and its backward."""
    for batch in batches:
        evaluate(engine, batch)
        loss = engine(*batch)
        evaluate(engine, batch)
        engine.backward(loss / len(batches))
        evaluate(engine, batch)
    engine.step()


def evaluate(engine: Any, batch: Batch) -> Tensor:
    """As a validation or generation loop: eval mode, no graph, twice; the model is called past the engine as well."""
    engine.eval()
    with torch.no_grad():
        loss = engine(*batch)
        assert torch.equal(engine.module(*batch), loss)
    engine.train()
    return loss


def optimizer_alone(engine: Any, batches: Sequence[Batch]) -> None:
    """Fabric: the optimizer is stepped, the engine never is."""
    for batch in batches:
        engine.backward(engine(*batch) / len(batches))
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def fresh_start(engine: Any, batches: Sequence[Batch]) -> None:
    """A forward that is thrown away, one that fails, and gradients that are forgotten, before the step."""
    engine(*batches[0])
    with pytest.raises(RuntimeError, match="shape"):
        engine(batches[0][0][:, 1:], batches[0][1])
    engine.backward(3 * engine(*batches[0]))
    engine.zero_grad()
    several_backwards(engine, batches)


COUNTING = {
    "own_count": (own_count, EVEN),
    "plain_backward": (plain_backward, EVEN),
    "boundary_flag": (boundary_flag, UNEVEN),
}
UNMANAGED = {"unmanaged": (several_backwards, UNEVEN)}
SINGLE = [
    no_sync,
    no_sync_once,
    coalesced,
    explicit_reduction,
    several_backwards,
    several_forwards,
    forwards_then_backwards,
    retained_graph,
    retained_graph_plain,
    evaluation_between,
    optimizer_alone,
    fresh_start,
]
PROGRAMS: dict[str, tuple[Program, Sequence[int]]] = {
    **COUNTING,
    **UNMANAGED,
    **{p.__name__: (p, UNEVEN) for p in SINGLE},
}


def batches_of(name: str, counts: Sequence[int]) -> list[list[Batch]]:
    """As many micro-batches per step as `counts` says."""
    made = make_batches(build(name), num_steps=len(counts), accumulation=max(counts), samples=SAMPLES)
    return [step[:count] for step, count in zip(made, counts, strict=True)]


@functools.lru_cache(maxsize=None)
def oracle(name: str, counts: Sequence[int], clip: float = 0.2) -> Trained:
    return train_plain(build(name), batches_of(name, counts), adamw, clip=clip)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=0.01, eps=EPS)


def run_programs(
    rank: int, world_size: int, stage: int, name: str, programs: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """The weights after each program, each with an engine of its own."""
    weights = {}
    for program_name in programs:
        program, counts = PROGRAMS[program_name]
        accumulation = 3 if program_name in COUNTING else 1
        extra = {"managed_gradient_accumulation": program_name not in UNMANAGED}
        config = make_config(stage, micro=SAMPLES // world_size, accumulation=accumulation, clip=0.2, **extra)
        with engine_of(build(name), config) as engine:
            for micro_batches in batches_of(name, counts):
                program(engine, [rank_share(batch, rank, world_size) for batch in micro_batches])
            weights[program_name] = whole_weights(engine)
    return weights


@pytest.mark.parametrize("name", ["mlp", "checkpointed_reentrant"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_way_to_spell_a_step_equals_plain_pytorch(stage: int, name: str) -> None:
    weights = run_ranks(2, run_programs, stage, name, list(PROGRAMS))[0]
    for program, (_, counts) in PROGRAMS.items():
        try:
            assert_close_weights(weights[program], oracle(name, counts).weights)
        except AssertionError as error:
            raise AssertionError(f"{program}: {error}") from None


def boundaries_and_counters(rank: int, world_size: int) -> None:
    model = build("mlp")
    (batch,), *_ = make_batches(model, num_steps=1, accumulation=1, samples=2)
    with engine_of(model, make_config(1, micro=2, accumulation=2)) as engine:
        seen = []
        for _ in range(4):
            engine.backward(engine(*batch))
            boundary = engine.is_gradient_accumulation_boundary()
            engine.step()
            seen.append(
                (boundary, engine.was_step_applied(), engine.micro_steps, engine.global_steps, engine.global_samples)
            )
        assert seen == [(False, False, 1, 0, 0), (True, True, 2, 1, 4), (False, False, 3, 1, 4), (True, True, 4, 2, 8)]
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(engine(*batch))
        engine.step()
        assert engine.was_step_applied() and engine.global_steps == 3
        with engine.no_sync():
            with (
                pytest.raises(TrainingStateError, match=r"engine.no_sync\(\) inside of engine.no_sync"),
                engine.no_sync(),
            ):
                pass
            with pytest.raises(
                AssertionError, match=r"engine.step\(\) inside of engine.no_sync.*\n.*Leave the context"
            ):
                engine.step()
    with engine_of(build("mlp"), make_config(1, micro=2, managed_gradient_accumulation=False)) as engine:
        assert not engine.is_gradient_accumulation_boundary()
        with pytest.raises(TrainingStateError, match="managed_gradient_accumulation is false, every step"):
            engine.set_gradient_accumulation_boundary(True)


def test_boundaries_counters_and_calls_out_of_place_are_as_documented() -> None:
    run_ranks(1, boundaries_and_counters)


def inference_loop(rank: int, world_size: int, stage: int) -> None:
    model = build("mlp")
    (batch,), *_ = make_batches(model, num_steps=1, accumulation=1, samples=2)
    with engine_of(model, make_config(stage, micro=2)) as engine:
        engine.eval()
        with torch.no_grad():
            losses = [engine(*batch) for _ in range(4)]
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        assert engine.micro_steps == 0
        engine.empty_partition_cache()
        assert engine.memory_by_kind()["unsharded"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_inference_loops_give_the_same_numbers_every_time_and_their_cache_can_be_emptied(stage: int) -> None:
    run_ranks(2, inference_loop, stage)


class LastForSome(nn.Module):
    """Layers in a row, of which some ranks leave out the last: the first whose gradient the others reduce."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x: Tensor, uses_last: bool) -> Tensor:
        for layer in self.layers if uses_last else self.layers[:-1]:
            x = x + torch.tanh(layer(x))
        return x.square().mean()


def talk_between_backward_and_step(rank: int, world_size: int, stage: int) -> Any:
    """Different buckets fill on different ranks, and each backward is followed by a collective of the user's own."""
    zero = {"reduce_bucket_size": 1, "overlap_comm": True}
    with engine_of(LastForSome(), make_config(stage, micro=1, zero=zero)) as engine:
        for _ in range(2):
            loss = engine(torch.full((1, 4), rank + 1.0), uses_last=rank == 0)
            for _ in range(2):
                engine.backward(loss / 2, retain_graph=True)
                dist.all_reduce(loss.detach().clone())
            engine.step()
        return whole_weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_fill_different_buckets_may_talk_between_backward_and_step(stage: int) -> None:
    model = LastForSome()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, eps=EPS)
    for _ in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            (model(torch.full((1, 4), rank + 1.0), uses_last=rank == 0) / 2).backward()
        optimizer.step()
    weights, *_ = run_ranks(2, talk_between_backward_and_step, stage, timeout=20)
    assert_close_weights(weights, {name: param.detach() for name, param in model.named_parameters()})

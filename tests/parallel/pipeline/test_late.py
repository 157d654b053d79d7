"""Steps that do not wait for the norm of all stages have the bits of those that do, whatever the norm then says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepspeed
from deepspeed.parallel.pipeline.layers import PipelineError, TiedLayerSpec
from deepspeed.parallel.pipeline.module import PipelineModule
from deepspeed.utils.errors import TrainingStateError
from tests.harness import run_ranks
from tests.parallel.pipeline.models import LONG, WIDTH, config_of, mlp
from tests.parallel.pipeline.test_engine import SCHEDULES

NUM_STEPS, NUM_MICRO, CLIP = 6, 4, 0.6
LOUD, BURST = (1, 4), 3
"""Steps whose gradients are clipped, and the one that overflows on the first stage alone."""


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.bursts = bool(x.abs().max() > 90)
        return x.clamp(-5, 5)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.full((1,), float("inf") if ctx.bursts else 0.01, dtype=grads[0].dtype)


class Spike(nn.Module):
    """Has a gradient that is not finite where inputs say so; the stages before and after do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return _Spike.apply(x, self.weight)


class Noisy(nn.Module):
    """Dropout, and running statistics: what a list that is begun again has to find as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(x))


def layers() -> list[nn.Module]:
    first, *others = mlp()
    return [Spike(), first, Noisy(), *others]


def batches(rank: int, num_ranks: int, bursts: bool) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for step in range(NUM_STEPS):
        for _ in range(NUM_MICRO):
            x = torch.randn(4 * num_ranks, WIDTH, generator=generator)
            y = torch.randn(4 * num_ranks, 4, generator=generator) * (3.0 if step in LOUD else 0.05)
            x[0, 0] = 100.0 if bursts and step == BURST else x[0, 0]
            yield x[rank::num_ranks], y[rank::num_ranks]


def engine_of(late: bool, zero: int, schedule: str, kind: str, optimizer: str) -> Any:
    chunks, placement = SCHEDULES[schedule]
    torch.manual_seed(5)
    module = PipelineModule(
        layers(), num_stages=2, loss_fn=lambda out, y: (out.float() - y).pow(2).mean(), partition_method="uniform",
        num_chunks=chunks, placement=placement,
    )  # fmt: skip
    config = config_of(
        zero, NUM_MICRO, gradient_clipping=CLIP,
        pipeline={"schedule": schedule, "post_validation": late},
        optimizer={"type": optimizer, "params": {"lr": 0.01}},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.05, "warmup_type": "linear"}},
    )  # fmt: skip
    if kind != "fp32":
        config[kind] = {"enabled": True}
    if kind == "fp16":
        config["fp16"] |= {"initial_scale_power": 4, "loss_scale_window": 2, "hysteresis": 1, "auto_cast": True}
    return deepspeed.initialize(model=module, config=config)[0]


def run(late: bool, case: tuple[int, str, str, str], asks: bool) -> dict[str, Any]:
    zero, schedule, kind, optimizer = case
    engine = engine_of(late, zero, schedule, kind, optimizer)
    data = batches(engine.mesh.rank("batch"), engine.mesh.size("batch"), kind == "fp16")
    data = ((x.bfloat16() if kind == "bf16" else x, y) for x, y in data)
    told = []
    for step in range(NUM_STEPS):
        loss = engine.train_batch(data)
        if asks and (step + engine.stage_id) % 2:  # not on all ranks at once
            told.append((step, loss.item(), engine.get_global_grad_norm(), engine.get_lr(), engine.loss_scale(),
                         engine.skipped_steps, engine.was_step_applied()))  # fmt: skip
        else:
            told.append((step, loss.item()))
    engine.settle_step()
    num_redone = engine._late.num_redone if late else 0
    states = [master.clone() for master in engine.zero_optimizer.single_partition_of_fp32_groups]
    for run in (run for members in engine.zero_optimizer.runs.steppable for _, run in members):
        states += [v.clone() for _, v in sorted(engine.basic_optimizer.state[run].items()) if isinstance(v, Tensor)]
    found = {
        "told": told, "redone": num_redone, "states": states, "norm": engine.get_global_grad_norm(),
        "weights": [tensor.detach().clone() for tensor in engine.module.state_dict().values()],
        "counts": (engine.global_steps, engine.skipped_steps, engine.global_samples, engine.get_lr(), engine.loss_scale()),
    }  # fmt: skip
    engine.destroy()
    return found


def _runs(rank: int, world: int, cases: list[tuple[int, str, str, str]], asks: bool) -> list[Any]:
    return [(run(False, case, asks), run(True, case, asks)) for case in cases]


CASES = [
    (0, "1f1b", "fp32", "Adam"),
    (1, "zb-h1", "fp16", "Adam"),
    (2, "zb-h2", "bf16", "SGD"),
]
MANY = [
    (zero, schedule, kind, optimizer)
    for zero in (0, 1, 2)
    for schedule in SCHEDULES
    for kind in ("fp32", "fp16", "bf16")
    for optimizer in ("Adam", "Lamb", "Muon", "SGD")
]


def check(found: list[Any], cases: list[tuple[int, str, str, str]]) -> None:
    for number, case in enumerate(cases):
        for waited, late in (mine[number] for mine in found):
            assert late["told"] == waited["told"], case
            assert late["counts"] == waited["counts"], case
            assert late["norm"] == waited["norm"], case
            for kind in ("weights", "states"):
                assert len(late[kind]) == len(waited[kind]), case
                assert all(torch.equal(a, b) for a, b in zip(late[kind], waited[kind], strict=True)), (case, kind)
            assert late["counts"][1] == (case[2] == "fp16"), "one step overflows in fp16"
            assert len(LOUD) <= late["redone"] < NUM_STEPS, "some steps are redone, and some stand"


def test_steps_that_are_taken_back_have_the_bits_of_those_that_waited() -> None:
    cases = MANY if LONG else CASES
    check(run_ranks(2, _runs, cases, asks=True, timeout=1700 if LONG else 120), cases)


def test_ranks_that_average_gradients_take_steps_back_together() -> None:
    cases = [(0, "1f1b", "fp32", "Adam"), (1, "zb-h1", "fp16", "Adam"), (2, "1f1b", "fp32", "Adam")]
    cases = cases if LONG else cases[1:2]
    check(run_ranks(4, _runs, cases, asks=True, timeout=200 if LONG else 60), cases)


class Failing(nn.Linear):
    """Fails where inputs say so."""

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 90:
            raise KeyError("nobody expects this")
        return super().forward(x)


def _start(layers: list[Any], **more: Any) -> Any:
    torch.manual_seed(5)
    module = PipelineModule(layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
    config = config_of(1, 2, pipeline={"post_validation": True}, optimizer={"type": "Adam", "params": {"lr": 0.01}})
    return deepspeed.initialize(model=module, config=config | more)[0]


def _failures(rank: int, world: int) -> None:
    def good(num: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.ones(4, WIDTH), torch.ones(4, 4))] * num)

    # The last stage fails in the second step, the loader ends in the third; both after a step that was clipped.
    for place in (0, 1):
        kinds = [nn.Linear, nn.Linear]
        kinds[place] = Failing
        engine = _start([kinds[0](WIDTH, WIDTH), kinds[1](WIDTH, 4)], gradient_clipping=1e-3)
        engine.train_batch(good(2))
        engine.settle_step()
        before = [value.clone() for value in engine.module.state_dict().values()]
        bad = [(torch.ones(4, WIDTH), torch.ones(4, 4)), (torch.full((4, WIDTH), 1e4), torch.ones(4, 4))]
        with pytest.raises((KeyError, PipelineError), match="nobody expects this"):
            engine.train_batch(iter(bad))
            engine.settle_step()
        assert all(torch.equal(*pair) for pair in zip(before, engine.module.state_dict().values(), strict=True))
        assert engine.global_steps == 1
        engine.train_batch(good(2))
        with pytest.raises(StopIteration, match="no batch left"):
            engine.train_batch(good(0))
        with pytest.raises(PipelineError, match="ended after 1 of the 2 micro-batches"):
            engine.train_batch(good(1))
        engine.train_batch(good(2))
        loss = engine.eval_batch(good(2))
        assert engine.global_steps == 3 and torch.isfinite(loss) and engine._late.num_redone == 3
        engine.destroy()


def test_a_failure_takes_the_step_back_on_ranks_that_have_gone_on() -> None:
    run_ranks(2, _failures)


class _FailsBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise KeyError("no way back")


class FailsBack(nn.Linear):
    """Fails in its backward while `fails`."""

    fails = True

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return _FailsBack.apply(out) if self.fails else out


def _fails_back(rank: int, world: int, late: bool, schedule: str) -> None:
    first = FailsBack(WIDTH, WIDTH)
    engine = _start(
        [first, nn.Linear(WIDTH, 4)], gradient_accumulation_steps=8,
        pipeline={"post_validation": late, "schedule": schedule},
    )  # fmt: skip

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.ones(4, WIDTH), torch.ones(4, 4))] * 8)

    for _ in range(2):
        with pytest.raises((KeyError, PipelineError), match="no way back"):
            engine.train_batch(data())
            engine.settle_step()
    assert engine.global_steps == 0
    first.fails = False
    losses = [engine.train_batch(data()).item() for _ in range(3)]
    engine.settle_step()
    assert engine.global_steps == 3 and losses[2] < losses[0]
    engine.destroy()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h2"])
@pytest.mark.parametrize("late", [False, True])
def test_a_first_stage_that_fails_when_the_last_one_is_done_keeps_nobody_waiting(late: bool, schedule: str) -> None:
    run_ranks(2, _fails_back, late, schedule)


def _refusals(rank: int, world: int) -> None:
    two = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("stage 3", {"zero_optimization": {"stage": 3}}),
        ("offload_optimizer", {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}),
        (
            "OnebitAdam keeps errors",
            {"optimizer": {"type": "OneBitAdam", "params": {"lr": 0.01}}, "zero_optimization": {}},
        ),
    ]
    for words, more in cases:
        with pytest.raises(ValueError, match=f"(?s)pipeline.post_validation.*{words}"):
            _start(two, **more)
    with pytest.raises(ValueError, match="MineIsOdd is not known to keep all"):
        module = PipelineModule(two, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform")
        config = config_of(0, 2, pipeline={"post_validation": True})
        deepspeed.initialize(model=module, config=config, optimizer=MineIsOdd(module.parameters(), lr=0.1))


class MineIsOdd(torch.optim.SGD):
    """Nobody knows what its step does."""


def test_what_cannot_be_taken_back_is_refused_by_name() -> None:
    run_ranks(2, _refusals)


def _tied(rank: int, world: int) -> list[Any]:
    found = []
    for late in (False, True):
        torch.manual_seed(5)
        layers = [
            TiedLayerSpec("ends", nn.Linear, WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH),
            TiedLayerSpec("ends", nn.Linear, WIDTH, WIDTH),
        ]  # fmt: skip
        module = PipelineModule(
            layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform", seed_layers=True
        )
        config = config_of(1, 2, pipeline={"post_validation": late}, gradient_clipping=0.3)
        engine = deepspeed.initialize(
            model=module, config=config | {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
        )[0]
        generator = torch.Generator().manual_seed(1)
        data = ((torch.randn(4, WIDTH, generator=generator), torch.zeros(4, WIDTH)) for _ in range(8))
        losses = [engine.train_batch(data).item() for _ in range(4)]
        engine.settle_step()
        found.append(
            (losses, engine.get_global_grad_norm(), {k: v.clone() for k, v in engine.module.state_dict().items()})
        )
        engine.destroy()
    return found


def test_shared_parameters_are_summed_before_a_step_that_does_not_wait() -> None:
    for waited, late in run_ranks(2, _tied):
        assert late[:2] == waited[:2]
        assert all(torch.equal(value, waited[2][name]) for name, value in late[2].items())


def _write(rank: int, world: int, settles: bool) -> str:
    engine = engine_of(True, 1, "1f1b", "fp32", "Adam")
    data = batches(engine.mesh.rank("batch"), engine.mesh.size("batch"), False)
    try:
        for _ in range(max(LOUD) + 1):
            engine.train_batch(data)
            if settles:
                engine.settle_step()
            with torch.no_grad():
                next(engine.module.parameters()).mul_(0.5)
        engine.settle_step()
    except TrainingStateError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def test_weights_written_before_a_step_is_taken_back_are_not_lost_without_a_word() -> None:
    assert run_ranks(2, _write, True) == ["", ""]
    for said in run_ranks(2, _write, False):
        assert "after a step that had to be taken back" in said
        assert "Call engine.settle_step() on all ranks" in said

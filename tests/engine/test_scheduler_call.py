"""Schedulers whose `step` takes arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepspeed.engine.scheduler_call import SchedulerCall
from deepspeed.utils.errors import TrainingStateError
from deepspeed.utils.logging import logger, warn_once
from tests.engine.runs import engine_of, make_config
from tests.harness import run_ranks
from tests.models import build, make_batches, rank_share, total_loss


class Recorded:
    """A scheduler that keeps what it is stepped with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


class Epochs(Recorded):
    def step(self, epoch: int, metric: float | None = None) -> None:
        self.calls.append((epoch, metric))


class Samples(Recorded):
    def step(self, increment: int) -> None:
        self.calls.append(increment)


class Free(Recorded):
    def step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


class Wrong(Recorded):
    def step(self) -> None:
        raise TypeError("of its own")


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Any:
    warn_once.cache_clear()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_scheduler_that_needs_an_argument_is_not_stepped_without_it_and_says_so(warned: Any) -> None:
    scheduler = Epochs()
    for _ in range(3):
        SchedulerCall(scheduler).step({}, 8)
    assert scheduler.calls == []
    assert len(warned.messages) == 1
    assert "Epochs.step needs epoch" in warned.messages[0]
    assert 'engine.step(lr_kwargs={"epoch": ...})' in warned.messages[0]


def test_what_the_script_gives_reaches_the_scheduler() -> None:
    scheduler = Epochs()
    call = SchedulerCall(scheduler)
    call.check({"epoch": 2, "metric": 0.5})
    call.step({"epoch": 2, "metric": 0.5}, 8)
    assert scheduler.calls == [(2, 0.5)]


def test_a_scheduler_that_counts_samples_gets_their_number() -> None:
    scheduler = Samples()
    SchedulerCall(scheduler).step({}, 8)
    assert scheduler.calls == [8]


def test_a_scheduler_that_takes_anything_is_called_with_nothing() -> None:
    scheduler = Free()
    SchedulerCall(scheduler).step({}, 8)
    assert scheduler.calls == [((), {})]


@pytest.mark.parametrize("lr_kwargs", [{"metrics": 1.0}, {"metric": 1.0}])
def test_arguments_that_do_not_fit_are_refused_by_name(lr_kwargs: dict[str, Any]) -> None:
    with pytest.raises(TrainingStateError, match=r"do not fit Epochs\.step\(epoch"):
        SchedulerCall(Epochs()).check(lr_kwargs)


def test_an_error_of_the_scheduler_is_the_scripts() -> None:
    with pytest.raises(TypeError, match="of its own"):
        SchedulerCall(Wrong()).step({}, 8)


def _plateau(rank: int, world_size: int, gives_metric: bool) -> list[float]:
    model = build("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    rates = []
    with engine_of(model, make_config(1, micro=2), optimizer=optimizer, lr_scheduler=scheduler) as engine:
        for (batch,) in make_batches(model, num_steps=5, accumulation=1, samples=2 * world_size):
            engine.backward(total_loss(engine(*rank_share(batch, rank, world_size))))
            engine.step(lr_kwargs={"metrics": 1.0} if gives_metric else None)
            rates.append(engine.get_lr()[0])
    return rates


@pytest.mark.parametrize(("gives_metric", "expected"), [(False, [0.1] * 5), (True, [0.1, 0.1, 0.01, 0.01, 0.001])])
def test_reduce_on_plateau_follows_the_metric_it_is_given(gives_metric: bool, expected: list[float]) -> None:
    for rates in run_ranks(2, _plateau, gives_metric):
        assert rates == pytest.approx(expected)

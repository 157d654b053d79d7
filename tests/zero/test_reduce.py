"""When gradients leave the rank, as text: real buckets and gradients on a wire that writes down what it carries.

A model has buckets a, b, c of one parameter each; a script backpropagates into some of them ("a b"), and the wire notes each
reduction when it is launched. The other rank's gradients are zeros, and sums are not divided, so a result is what this rank
gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed.assembly.assemble import gradients_of_bucket
from deepspeed.comm.exchange import Pending
from deepspeed.kernels.reference.sums import deliver
from deepspeed.zero.bucket import Bucket
from deepspeed.zero.gradients import READY, FlatPool, Gradients
from deepspeed.zero.layout import BucketLayout
from deepspeed.zero.reduce import Limit, Reducer
from deepspeed.zero.reduction import Reduction, When

NAMES = "abc"
NUMEL = 3
CPU = torch.device("cpu")


class Wire:
    """One of two ranks, whose peer sends zeros."""

    group, rank, world_size, needs_shard = None, 0, 2, True

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def invalidate(self) -> None:
        pass

    def start_all_gather(self, full: Tensor, shard: Tensor | None = None) -> Pending:
        raise AssertionError("nothing is gathered here")

    def broadcast(self, full: Tensor, source: int = 0) -> None:
        raise AssertionError("nothing is broadcast here")

    def start_reduce_scatter(self, full: Tensor, out: Tensor, *, divide_by: float = 1, accumulate: bool) -> Pending:
        self._log.append(self._name)
        return Pending(lambda: deliver(full[: out.numel()].clone(), out, divide_by, accumulate))

    def start_all_reduce(self, full: Tensor, divide_by: float = 1) -> Pending:
        self._log.append(self._name)
        return Pending(lambda: deliver(full, full, divide_by, False))


class Run:
    """A reducer over the three buckets; `log` has the reductions, in order."""

    def __init__(self, when: When | dict[str, When], *, should_reduce: Callable[[], bool] = lambda: True) -> None:
        self.log: list[str] = []
        self.completed: list[str] = []
        self.params = {name: nn.Parameter(torch.zeros(NUMEL)) for name in NAMES}
        pool = FlatPool()
        self.gradients = {
            name: self._gradients(name, when[name] if isinstance(when, dict) else when, pool) for name in NAMES
        }
        self.reducer = Reducer(
            list(self.gradients.values()),
            pool,
            in_flight=Limit(4, 2**62),
            should_reduce=should_reduce,
            on_complete=lambda bucket: self.completed.append(bucket.names[0]),
        )

    def _gradients(self, name: str, when: When, pool: FlatPool) -> Gradients:
        wire = Wire(name, self.log)
        param = self.params[name]
        layout = BucketLayout((NUMEL,), (0,), wire.world_size)
        bucket = Bucket(
            -1, [param], [name], [param.shape], layout, is_sharded=False, dtype=torch.float32, device=CPU, exchange=wire
        )
        bucket.adopt()
        return gradients_of_bucket(
            bucket,
            Reduction(exchange=wire, when=when),
            torch.float32,
            pool,
            delivers_shard=when is not When.NEVER,
        )

    def backward(self, names: str, value: float = 1.0) -> None:
        """A backward that reaches the named parameters, in this order, giving each `value` everywhere."""
        for name in names.split():
            (self.params[name] * value).sum().backward()

    def text(self) -> str:
        """The reductions since the last call."""
        said = " ".join(self.log)
        self.log.clear()
        return said

    def result(self, name: str) -> list[float]:
        """This step's gradient of a parameter, after `finish`."""
        return self.gradients[name].result[:NUMEL].tolist()


EACH = pytest.mark.parametrize("when", [When.EACH_BACKWARD, When.AT_BOUNDARY])


@EACH
def test_a_bucket_leaves_when_it_is_full_if_those_before_it_have_left(when: When) -> None:
    run = Run(when)
    run.backward("b")
    assert run.text() == ""
    run.backward("a")
    assert run.text() == "a b"
    run.reducer.flush()
    assert run.text() == "c", "nothing arrived for it: zeros"


@EACH
def test_while_a_backward_is_held_open_nothing_leaves_and_one_reduction_has_the_sum(when: When) -> None:
    run = Run(when)
    with run.reducer.hold():
        for value in (1.0, 2.0, 4.0):
            run.backward("a b", value)
            run.reducer.flush()
        assert run.text() == "" and run.completed == []
    assert run.text() == "a b" and run.completed == ["a", "b"]
    run.reducer.flush()
    assert run.text() == "c"
    run.reducer.finish()
    assert [run.result(name) for name in NAMES] == [[7.0] * NUMEL, [7.0] * NUMEL, [0.0] * NUMEL]


@EACH
def test_holds_nest(when: When) -> None:
    run = Run(when)
    with run.reducer.hold():
        with run.reducer.hold():
            run.backward("a")
        assert run.reducer.is_held and run.text() == ""
        run.backward("a")
    assert not run.reducer.is_held and run.text() == "a"
    run.reducer.finish()
    assert run.result("a") == [2.0] * NUMEL


@EACH
def test_a_bucket_that_left_before_the_hold_is_reduced_again_for_what_came_in_it(when: When) -> None:
    run = Run(when)
    run.backward("a b")
    with run.reducer.hold():
        run.backward("a", 2.0)
    assert run.text() == "a b c a"
    run.reducer.finish()
    assert [run.result(name)[0] for name in NAMES] == [3.0, 1.0, 0.0]


@EACH
def test_a_hold_that_an_error_ends_lets_go_of_the_backward(when: When) -> None:
    run = Run(when)
    with pytest.raises(ZeroDivisionError), run.reducer.hold():
        run.backward("a")
        raise ZeroDivisionError
    assert not run.reducer.is_held
    run.reducer.drop()
    run.text()
    run.backward("a b c")
    assert run.text() == "a b c"
    run.reducer.finish()
    assert run.result("a") == [1.0] * NUMEL


@EACH
def test_a_round_that_is_due_stays_due_while_a_backward_is_held_open(when: When) -> None:
    run = Run(when)
    with run.reducer.hold():
        run.reducer.expect_round()
        run.reducer.flush()
        assert run.text() == ""
    run.reducer.flush()
    assert run.text() == "a b c"


def test_a_step_inside_of_a_held_backward_is_refused() -> None:
    run = Run(When.AT_BOUNDARY)
    with run.reducer.hold(), pytest.raises(AssertionError, match="held open"):
        run.reducer.finish()


def test_micro_batches_add_up_and_leave_at_the_boundary() -> None:
    is_last = False
    run = Run(When.AT_BOUNDARY, should_reduce=lambda: is_last)
    run.backward("a b c")
    run.reducer.flush()
    assert run.text() == ""
    is_last = True
    run.backward("c b a", 2.0)
    assert run.text() == "a b c", "in one order, whatever order they fill in"
    run.reducer.finish()
    assert run.result("b") == [3.0] * NUMEL


def test_what_never_leaves_is_the_ranks_own_sum() -> None:
    run = Run(When.NEVER)
    for value in (1.0, 2.0):
        run.backward("a b", value)
        run.reducer.flush()
    run.reducer.finish()
    assert run.text() == ""
    assert [run.result(name)[0] for name in NAMES] == [3.0, 3.0, 0.0]
    assert all(gradients.take_missed_flag() is None for gradients in run.gradients.values()), "nobody was told"


def test_buckets_that_never_leave_stand_among_others_that_do() -> None:
    run = Run({"a": When.AT_BOUNDARY, "b": When.NEVER, "c": When.EACH_BACKWARD})
    run.backward("a b c")
    run.reducer.flush()
    run.backward("b", 2.0)
    run.reducer.finish()
    assert run.text() == "a c"
    assert [run.result(name)[0] for name in NAMES] == [1.0, 3.0, 1.0]


def test_the_next_step_begins_from_nothing() -> None:
    run = Run({"a": When.AT_BOUNDARY, "b": When.NEVER, "c": When.EACH_BACKWARD})
    for value in (1.0, 5.0):
        run.backward("a b c", value)
        run.reducer.flush()
        run.reducer.finish()
        assert [run.result(name)[0] for name in NAMES] == [value] * 3
        run.reducer.drop()


@EACH
def test_a_parameter_counts_as_arrived_with_the_part_that_is_ready(when: When) -> None:
    run = Run(when)
    param: Any = run.params["a"]
    setattr(param, READY, False)
    for value in (1.0, 2.0):
        run.backward("a", value)
        assert run.text() == ""
    setattr(param, READY, True)
    run.backward("a", 4.0)
    assert run.text() == "a"
    run.reducer.finish()
    assert run.result("a") == [7.0] * NUMEL


@EACH
def test_parts_whose_last_one_never_came_leave_at_the_end_of_the_backward(when: When) -> None:
    run = Run(when)
    setattr(run.params["a"], READY, False)
    run.backward("a b")
    assert run.text() == ""
    run.reducer.flush()
    assert run.text() == "a b c"
    run.reducer.finish()
    assert run.result("a") == [1.0] * NUMEL


@EACH
def test_another_part_after_the_ready_one_is_added_to_what_has_left(when: When) -> None:
    run = Run(when)
    run.backward("a b c")
    run.backward("a", 2.0)
    run.reducer.finish()
    assert run.result("a") == [3.0] * NUMEL


@EACH
def test_the_order_of_launches_is_the_one_that_was_set(when: When) -> None:
    run = Run(when)
    run.backward("c b a")
    run.reducer.finish()
    order = run.reducer.rounds.completion_order()
    assert order == [2, 1, 0]
    run.reducer.drop()
    run.text()
    run.reducer.rounds.set_order(order)
    run.backward("a b c")
    assert run.text() == "c b a"

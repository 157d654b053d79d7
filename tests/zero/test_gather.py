"""The protocol of the gatherer, on ranks that are threads and buckets that count: no torch, no process group.

Each rank runs a script of phases, written as text: "f0 1 2" is a forward that uses buckets 0, 1, 2 in turn, "b2 1 0" a
backward, "i0 1" an inference. A fake bucket checks that all ranks launch the same gathers in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepspeed
from deepspeed.zero.bucket import BucketState
from deepspeed.zero.gather import Gatherer, PhaseKind
from deepspeed.zero.loads import LoadQueue
from tests.engine.runs import small_units
from tests.harness import run_ranks

KINDS = {"f": PhaseKind.FORWARD, "b": PhaseKind.BACKWARD, "i": PhaseKind.INFERENCE}
NUMEL = 10


class FakeBucket:
    """Has the states of a bucket and writes its gathers into the log of its rank."""

    is_sharded = True

    def __init__(self, index: int, world_size: int, log: list[int]) -> None:
        self.index, self.log = index, log
        self.exchange = SimpleNamespace(world_size=world_size)
        self.layout = SimpleNamespace(numel=NUMEL)
        self.state = BucketState.SHARDED
        self.holders = 0
        self.loads = LoadQueue()

    def hold(self, params: object = None) -> None:
        self.holders += 1

    def unhold(self, params: object = None) -> None:
        self.holders -= 1

    def regather(self) -> None:
        self.log.append(self.index)
        if self.state is BucketState.SHARDED:
            self.state = BucketState.GATHERING

    def finish_unshard(self) -> None:
        self.state = BucketState.UNSHARDED if self.state is not BucketState.SHARDED else self.state

    def reshard(self, *, keeps_written: bool = False) -> None:
        assert self.holders == 0, "resharded while in use"
        self.state = BucketState.SHARDED


class Ranks:
    """Runs one script per rank; after it, `logs` has each rank's gathers and `agreements` their number per phase."""

    def __init__(self, world_size: int, num_buckets: int, **limits: int) -> None:
        self.world_size = world_size
        self.logs: list[list[int]] = [[] for _ in range(world_size)]
        self.agreements: list[list[int]] = [[] for _ in range(world_size)]
        self._wishes: list[tuple[int, int]] = [(0, 0)] * world_size
        self._barrier = threading.Barrier(world_size, timeout=5)
        self.buckets = [[FakeBucket(i, world_size, log) for i in range(num_buckets)] for log in self.logs]
        given = {"prefetch_numel": 2 * NUMEL, "max_live_numel": 10**9, "max_reuse_distance": 0, **limits}
        self.gatherers = [
            Gatherer(buckets, self._agree_as(rank), **given)  # type: ignore[arg-type]
            for rank, buckets in enumerate(self.buckets)
        ]

    def _agree_as(self, rank: int) -> Any:
        def agree(wish: int, digest: int) -> Callable[[], list[tuple[int, int]]]:
            self._wishes[rank] = (wish, digest)

            def answers() -> list[tuple[int, int]]:
                self._barrier.wait()
                found = list(self._wishes)
                self._barrier.wait()
                return found

            return answers

        return agree

    def run(self, *scripts: list[str]) -> None:
        """Run scripts[rank], or the one script on every rank."""
        failures: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                for phase in scripts[rank % len(scripts)]:
                    self._phase(rank, phase)
            except BaseException as error:
                failures.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert all(log == self.logs[0] for log in self.logs), f"ranks gathered differently: {self.logs}"

    def _phase(self, rank: int, phase: str) -> None:
        gatherer = self.gatherers[rank]
        before = gatherer.num_agreements
        kind = KINDS[phase[0]]
        gatherer.begin(kind)
        for index in (int(word) for word in phase[1:].split()):
            bucket = self.buckets[rank][index]
            gatherer.request(bucket)  # type: ignore[arg-type]
            assert bucket.state is BucketState.UNSHARDED
            gatherer.release(bucket)  # type: ignore[arg-type]
        gatherer.end()
        if kind is PhaseKind.BACKWARD:
            assert self.unsharded(rank) == []
        self.agreements[rank].append(gatherer.num_agreements - before)

    def unsharded(self, rank: int) -> list[int]:
        return [bucket.index for bucket in self.buckets[rank] if bucket.state is not BucketState.SHARDED]

    def clear(self) -> None:
        for log in [*self.logs, *self.agreements]:
            log.clear()


STEP = ["f0 1 2", "b2 1 0"]


def test_a_known_order_settles_into_a_plan_with_one_agreement_per_phase() -> None:
    ranks = Ranks(3, 3)
    ranks.run(STEP * 4)
    # From the second step on, bucket 2 stays unsharded for the backward that begins with it: that is anranks order.
    assert ranks.agreements[0] == [4, 4, 4, 3, 1, 3, 1, 1]
    assert ranks.logs[0] == [0, 1, 2, 2, 1, 0] + [0, 1, 2, 1, 0] * 3


def test_one_rank_never_asks_anybody() -> None:
    ranks = Ranks(1, 3)
    ranks.run(STEP * 3)
    assert ranks.gatherers[0].num_agreements == 0


def test_nothing_is_unsharded_after_a_phase_without_reuse_distance() -> None:
    ranks = Ranks(2, 3)
    ranks.run(["f0 1 2"])
    assert ranks.unsharded(0) == []


def test_what_backward_uses_first_is_kept_within_the_reuse_distance() -> None:
    ranks = Ranks(2, 4, max_reuse_distance=2 * NUMEL)
    ranks.run(["f0 1 2 3", "b3 2 1 0"] * 3)
    ranks.clear()
    ranks.run(["f0 1 2 3"])
    kept = ranks.unsharded(0)
    assert 3 in kept and 0 not in kept
    ranks.run(["b3 2 1 0"])
    assert len(ranks.logs[0]) == 8 - len(kept)


def test_nothing_is_kept_beyond_the_live_limit() -> None:
    ranks = Ranks(2, 4, max_reuse_distance=10**9, max_live_numel=0)
    ranks.run(["f0 1 2 3", "b3 2 1 0"] * 3)
    ranks.run(["f0 1 2 3"])
    assert ranks.unsharded(0) == []


def test_a_rank_that_leaves_the_plan_is_served_and_the_others_finish_theirs() -> None:
    ranks = Ranks(2, 4)
    ranks.run(["i0 1 2"] * 3)
    ranks.run(["i0 3 2"], ["i0 1 2"])
    assert ranks.gatherers[0].num_deviations == 1
    ranks.clear()
    ranks.run(["i0 1 2"] * 3)
    assert ranks.agreements[0] == [4, 4, 1]


def test_a_rank_that_skips_a_part_of_the_plan_stays_in_step_without_asking() -> None:
    ranks = Ranks(2, 4)
    ranks.run(["i0 1 2 3"] * 3)
    ranks.clear()
    ranks.run(["i0 3"], ["i0 1 2 3"])
    assert ranks.agreements[0] == [1]
    assert ranks.logs[0] == [0, 1, 2, 3]


def test_two_forwards_before_two_backwards_have_plans_of_their_own() -> None:
    ranks = Ranks(2, 3, max_reuse_distance=NUMEL)
    ranks.run(["f0 1 2", "f2 1", "b1 2", "b2 1 0"] * 4)
    assert ranks.agreements[0][-4:] == [1, 1, 1, 1]


def test_training_and_inference_have_plans_of_their_own() -> None:
    ranks = Ranks(2, 3)
    ranks.run([*STEP, "i2 1"] * 4)
    assert ranks.agreements[0][-3:] == [1, 1, 1]


def test_prefetch_launches_ahead_of_use_up_to_its_limit() -> None:
    ranks = Ranks(2, 4, prefetch_numel=2 * NUMEL)
    ranks.run(["i0 1 2 3"] * 2)
    launched: list[int] = []

    def look(rank: int) -> None:
        gatherer, buckets = ranks.gatherers[rank], ranks.buckets[rank]
        gatherer.begin(PhaseKind.INFERENCE)
        if rank == 0:
            launched.extend(ranks.unsharded(0))
        for bucket in buckets:
            gatherer.request(bucket)  # type: ignore[arg-type]
            gatherer.release(bucket)  # type: ignore[arg-type]
        gatherer.end()

    threads = [threading.Thread(target=look, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert launched == [0, 1]


uses = st.lists(st.integers(0, 3), max_size=6).map(lambda found: " ".join(map(str, found)))
phases = st.tuples(st.sampled_from("fbi"), st.lists(uses, min_size=3, max_size=3))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(phases, min_size=1, max_size=6),
    st.integers(1, 3),
    st.sampled_from([0, NUMEL, 3 * NUMEL]),
    st.sampled_from([0, NUMEL, 3 * NUMEL]),
)
def test_any_order_on_any_rank_is_served(
    script: list[tuple[str, list[str]]], repeats: int, prefetch: int, reuse: int
) -> None:
    ranks = Ranks(3, 4, prefetch_numel=prefetch, max_reuse_distance=reuse)
    ranks.run(*([kind + of_ranks[rank] for kind, of_ranks in script] * repeats for rank in range(3)))


def test_a_use_outside_of_a_phase_is_gathered_without_asking() -> None:
    ranks = Ranks(2, 2)
    for gatherer, buckets in zip(ranks.gatherers, ranks.buckets, strict=True):
        gatherer.request(buckets[1])  # type: ignore[arg-type]
        gatherer.release(buckets[1])  # type: ignore[arg-type]
        gatherer.reshard_all()
    assert ranks.logs == [[1], [1]]
    assert ranks.unsharded(0) == []


@pytest.mark.parametrize("reuse", [0, 10**9])
def test_gather_contexts_between_phases_do_not_upset_the_count_of_what_is_live(reuse: int) -> None:
    ranks = Ranks(1, 3, max_reuse_distance=reuse, max_live_numel=2 * NUMEL)
    for _ in range(5):
        ranks.run(["f0 1 2"])
        for bucket in ranks.buckets[0]:
            bucket.reshard()
        ranks.run(["b2 1 0"])
    assert ranks.gatherers[0]._live_numel == 0


class Positions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.linspace(-1, 1, 64).view(16, 4))

    def forward(self, count: int) -> Any:
        return {"rows": (self.table[:count],)}


class UsesViews(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = Positions()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Any) -> Any:
        (rows,) = self.positions(len(x))["rows"]
        for layer in self.layers:
            x = torch.tanh(layer(x)) * rows
        return x.square().mean()


def views_of_parameters(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    x = torch.linspace(0, 1, 32).view(8, 4)
    plain, losses = UsesViews(), []
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(3):
        loss = plain(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model, found = UsesViews(), []
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": zero,
    }
    with small_units():
        engine, *_ = deepspeed.initialize(model=model, config=config)
    for _ in range(3):
        loss = engine(x)
        alone = model.positions(2)["rows"][0]
        with deepspeed.zero.GatheredParameters(model.positions.table):
            expected = model.positions.table[:2].clone()
        assert torch.equal(alone, expected)
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    assert len(engine._built.sharded) > 2
    return losses, found


def test_a_module_may_return_a_piece_of_its_parameter() -> None:
    for losses, found in run_ranks(2, views_of_parameters):
        assert found == pytest.approx(losses, rel=1e-6)

"""Lists from measured times: never worse than the named ones, within memory, near what no list can beat."""

from __future__ import annotations

import random
import time

import pytest

from deepspeed.parallel.pipeline import schedules
from deepspeed.parallel.pipeline.actions import Actions, looped, v_shaped
from deepspeed.parallel.pipeline.check import Costs, makespan, peak_alive, require_valid, simulate
from deepspeed.parallel.pipeline.generate import generate, least_makespan
from deepspeed.utils.errors import DeepSpeedError
from tests.parallel.pipeline.models import LONG


def _costs(generator: random.Random, num_stages: int) -> Costs:
    forward, input, weight = ([generator.uniform(0.5, 2) for _ in range(num_stages)] for _ in range(3))
    return Costs(forward, input, weight, generator.choice([0.0, 0.1, 0.5]))


def _named(rank_of: tuple[int, ...], num_micro: int, costs: Costs, limit: float) -> list[float]:
    found = []
    for make in schedules.NAMED.values():
        try:
            made: Actions = make(max(rank_of) + 1, num_micro)
        except DeepSpeedError:
            continue
        if made.rank_of == rank_of and max(peak_alive(made, costs)) <= limit:
            found.append(makespan(made, costs))
    return found


def test_random_cost_sets_are_never_worse_than_the_best_named_schedule() -> None:
    generator = random.Random(0)
    for _ in range(500 if LONG else 80):
        num_ranks, num_micro = generator.randint(1, 6), generator.randint(1, 12)
        rank_of = v_shaped(num_ranks) if generator.random() < 0.3 else looped(num_ranks, num_ranks)
        costs = _costs(generator, len(rank_of))
        limit = generator.choice([2.0, 2.0 * num_ranks, 1e9])
        made = generate(rank_of, num_micro, costs, [limit] * num_ranks)
        require_valid(made)
        assert max(peak_alive(made, costs)) <= limit
        makespan = simulate(made, costs).makespan
        assert makespan <= min(_named(rank_of, num_micro, costs, limit), default=float("inf")) + 1e-9
        assert makespan >= least_makespan(rank_of, num_micro, costs) - 1e-9


@pytest.mark.timeout(3600)
@pytest.mark.skipif(not LONG, reason="minutes: make test-pipeline")
def test_500_random_cost_sets_of_any_size_are_never_worse_and_take_seconds() -> None:
    generator, slowest, gains = random.Random(1), (0.0, 0, 0), []
    for _ in range(500):
        num_ranks, num_micro = int(2 ** generator.uniform(0, 6)), int(2 ** generator.uniform(0, 9))
        rank_of = v_shaped(num_ranks) if num_ranks <= 32 and generator.random() < 0.3 else looped(num_ranks, num_ranks)
        costs = _costs(generator, len(rank_of))
        limit = generator.choice([2.0, 2.0 * num_ranks, 1e9])
        began = time.process_time()
        made = generate(rank_of, num_micro, costs, [limit] * num_ranks)
        slowest = max(slowest, (time.process_time() - began, len(rank_of), num_micro))
        assert max(peak_alive(made, costs)) <= limit
        best = min(_named(rank_of, num_micro, costs, limit), default=float("inf"))
        ends = makespan(made, costs)
        assert ends <= best + 1e-9 * num_micro
        gains.append(1 - ends / best if best < float("inf") else None)
    known = sorted(gain for gain in gains if gain is not None)
    print(f"the slowest took {slowest[0]:.1f} s ({slowest[1]} stages, {slowest[2]} micro-batches)")
    print(
        f"{len(gains) - len(known)} of 500 have no named list that fits; of the others {sum(g > 1e-9 for g in known)} are faster by"
    )
    print(f"{known[len(known) // 2]:.1%} in the middle, {known[-1]:.1%} at most")
    assert slowest[0] < 5


def test_the_quick_clock_is_the_simulation_s() -> None:
    generator = random.Random(4)
    for make in schedules.NAMED.values():
        made = make(4, 12)
        costs = _costs(generator, made.num_stages)
        assert makespan(made, costs) == pytest.approx(simulate(made, costs).makespan, rel=1e-12)


def test_a_slow_stage_in_the_middle_is_kept_busy() -> None:
    costs = Costs([1, 3, 1, 1], [1, 3, 1, 1], [1, 3, 1, 1], hop=0.2)
    made = generate(looped(4, 4), 16, costs)
    assert simulate(made, costs).makespan <= 1.01 * least_makespan(looped(4, 4), 16, costs)


def test_many_stages_and_micro_batches_are_a_matter_of_seconds() -> None:
    costs = _costs(random.Random(1), 16)
    require_valid(generate(looped(16, 16), 128, costs))


def test_no_room_for_one_micro_batch_is_refused_by_rank() -> None:
    costs = Costs([1, 1], [1, 1], [1, 1], activation=[3.0, 5.0])
    with pytest.raises(DeepSpeedError, match="rank 1 may keep 4 alive, one micro-batch at each of its stages takes 5"):
        generate((0, 1), 4, costs, [4.0, 4.0])

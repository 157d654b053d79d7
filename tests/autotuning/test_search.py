"""The search against known truths: no processes, outcomes by formula."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from deepspeed.autotuning import lessons
from deepspeed.autotuning.experiment import Ended
from deepspeed.autotuning.files import tail
from deepspeed.autotuning.lessons import Outcome, outcome_of
from deepspeed.autotuning.prior import prior_parts
from deepspeed.autotuning.space import Candidate, Question, candidates
from deepspeed.autotuning.surrogate import Measurement, Surrogate, expected_gain
from deepspeed.autotuning.tuners import FEW, MOST, SURE_STD, TUNERS, Tuner
from deepspeed.config import load_config

INFO: dict[str, Any] = {
    "num_params": 10**7,
    "flops": 4e9,
    "forward_flops": 1.3e9,
    "activation_mem_per_gpu": 8 << 20,
    "num_modules": 80,
    "dtype": "float32",
    "device": "cpu",
    "rates": {"matmul_flops": 1e11, "copy_nbytes_s": 1e10, "wire_nbytes_s": 1e9, "wire_latency_s": 1e-4},
}


def space(**config: Any) -> list[Candidate]:
    section = {"max_train_micro_batch_size_per_gpu": 64, **config.pop("autotuning", {})}
    return candidates(Question(config, load_config({"autotuning": section}).autotuning, 4, is_host=True))


def truth(candidate: Candidate, seed: int) -> float:
    """Another machine than the model's: every part is off by a factor of its own, and large micro-batches leave the caches."""
    draw = random.Random(f"{seed}")
    per_sample, fixed, stage_cost = 0.02 * draw.uniform(0.5, 3), 0.1 * draw.uniform(0.3, 3), draw.uniform(0.02, 0.3)
    order = draw.sample(range(4), 4)
    cache = 1 + 0.15 * max(0.0, math.log2(candidate.micro / 2 ** draw.randint(2, 5)))
    again = {"full": 1.3, "selective": 1.06}.get(str(candidate.values.get("activation_checkpointing.recompute")), 1.0)
    return candidate.micro * per_sample * cache * again + fixed + stage_cost * order[candidate.stage]


def search(tuner: Tuner, seed: int, limit: int = 200) -> tuple[int, float]:
    """(trials, regret) with two percent of noise."""
    draw = random.Random(seed + 1)
    for _ in range(limit):
        candidate = tuner.next()
        if candidate is None:
            break
        seconds = truth(candidate, seed) * draw.gauss(1, 0.01)
        tuner.tell(candidate, measured(candidate, seconds))
    found = [c for c in tuner.candidates if c.name in tuner.outcomes]
    chosen = max(found, key=lambda c: tuner.outcomes[c.name].metrics["throughput"])  # type: ignore[index]
    best = max(c.train_batch / truth(c, seed) for c in tuner.candidates)
    return len(tuner.outcomes), 1 - chosen.train_batch / truth(chosen, seed) / best


def measured(candidate: Candidate, seconds: float) -> Outcome:
    return Outcome(
        "measured", metrics={"latency": seconds, "throughput": candidate.train_batch / seconds, "step_s": [seconds] * 3}
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_fifth_of_the_trials_finds_a_configuration_within_three_percent_of_the_best(seed: int) -> None:
    found = space(activation_checkpointing={"recompute": "auto"})
    tuner = TUNERS["model_based"](found, prior_parts(INFO, found), "throughput", most_micros=10**9)
    trials, regret = search(tuner, seed)
    assert len(found) == 84
    assert trials <= 0.2 * len(found)
    assert regret <= 0.03


@pytest.mark.parametrize("kind", ["gridsearch", "random"])
def test_grid_and_random_try_everything_once(kind: str) -> None:
    found = space()
    tuner = TUNERS[kind](found, prior_parts(INFO, found), "throughput", most_micros=10**9)
    order = []
    while (candidate := tuner.next()) is not None:
        order.append(candidate.name)
        tuner.tell(candidate, measured(candidate, 1.0))
    assert sorted(order) == sorted(c.name for c in found)
    assert (order == [c.name for c in found]) == (kind == "gridsearch")


def test_no_more_micro_batches_of_a_kind_are_tried_than_the_section_says() -> None:
    found = space(zero_optimization={"stage": 1})
    tuner = TUNERS["gridsearch"](found, prior_parts(INFO, found), "throughput", most_micros=3)
    order = []
    while (candidate := tuner.next()) is not None:
        order.append(candidate.micro)
        tuner.tell(candidate, measured(candidate, 1.0))
    assert order == [1, 2, 4]


def test_latency_is_minimised() -> None:
    found = space(zero_optimization={"stage": 1})
    tuner = TUNERS["model_based"](found, prior_parts(INFO, found), "latency", most_micros=10**9)
    while (candidate := tuner.next()) is not None:
        tuner.tell(candidate, measured(candidate, truth(candidate, 0)))
    best = min(found, key=lambda c: truth(c, 0))
    assert best.name in tuner.outcomes
    assert len(tuner.outcomes) <= FEW


def test_one_wrong_part_is_told_from_the_others_by_trials_that_differ_in_it() -> None:
    found = space()
    parts = prior_parts(INFO, found)
    true = {
        name: sum(s * {"compute": 3.0, "calls": 0.5}.get(part, 1.0) for part, s in each.items())
        for name, each in parts.items()
    }
    tried = {c.name for c in found if c.stage == 1 and c.micro in (1, 8, 64)}
    predicted = Surrogate(found, parts).predict({name: Measurement(true[name]) for name in tried})
    unseen = [c.name for c in found if c.stage == 1 and c.name not in tried]
    assert {name: predicted[name].step_s for name in unseen} == pytest.approx(
        {name: true[name] for name in unseen}, rel=0.05
    )


def test_once_little_is_to_be_gained_trials_go_where_the_doubt_is() -> None:
    found = space(activation_checkpointing={"recompute": "auto"})
    tuner = TUNERS["model_based"](found, prior_parts(INFO, found), "throughput", most_micros=10**9)
    doubts = []
    while (candidate := tuner.next()) is not None:
        tuner.tell(candidate, measured(candidate, truth(candidate, 0)))
        doubts.append(max(tuner.predictions[c.name].std for c in tuner.open_candidates()))
    assert len(doubts) == int(MOST * len(found)) or doubts[-1] <= SURE_STD
    assert doubts[-1] < 0.25 * doubts[0]
    is_full = len(doubts) == int(MOST * len(found))
    assert (f"{len(doubts)} of {len(found)} were measured" in tuner.why_ended()) == is_full


def test_after_running_out_of_memory_nothing_larger_of_the_kind_is_tried() -> None:
    found = space(zero_optimization={"stage": [1, 2]})
    tuner = TUNERS["gridsearch"](found, prior_parts(INFO, found), "throughput", most_micros=10**9)
    by_name = {c.name: c for c in found}
    tuner.tell(by_name["z1_gas1_tmbspg4"], Outcome("memory"))
    left = [c.name for c in tuner.open_candidates()]
    assert "z1_gas1_tmbspg2" in left and "z2_gas1_tmbspg64" in left
    assert "z1_gas1_tmbspg8" not in left


def test_a_stage_that_only_fails_is_left() -> None:
    found = space()
    tuner = TUNERS["gridsearch"](found, prior_parts(INFO, found), "throughput", most_micros=10**9)
    for candidate in found[:3]:
        tuner.tell(candidate, Outcome("failed"))
    assert {c.stage for c in tuner.open_candidates()} == {1, 2, 3}


def test_without_trials_the_prediction_is_the_models_and_trials_correct_it() -> None:
    found = space(zero_optimization={"stage": 1})
    parts = prior_parts(INFO, found)
    surrogate = Surrogate(found, parts)
    prior = {name: sum(each.values()) for name, each in parts.items()}
    assert {n: p.step_s for n, p in surrogate.predict({}).items()} == pytest.approx(prior)
    one = surrogate.predict({found[2].name: Measurement(3 * prior[found[2].name])})
    assert one[found[2].name].step_s == pytest.approx(3 * prior[found[2].name], rel=0.01)
    assert one[found[3].name].step_s == pytest.approx(3 * prior[found[3].name], rel=0.1)
    assert one[found[2].name].std < one[found[3].name].std < one[found[6].name].std


def test_expected_gain_grows_with_doubt_and_is_never_negative() -> None:
    assert expected_gain(1.0, 0.0, 2.0) == 0.0
    assert expected_gain(2.5, 0.0, 2.0) == pytest.approx(0.5)
    assert 0 < expected_gain(1.0, 0.5, 2.0) < expected_gain(1.0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("ended", "log", "state", "words"),
    [
        ((1, True, 2, ""), "CUDA error: out of memory", "memory", "Set autotuning.device_memory_gb"),
        ((1, False, -1, ""), "error: unrecognized arguments: --foo 3", "failed", "does not know the argument --foo 3"),
        ((1, True, 0, ""), "ValueError: x", "failed", "Run the script once without --autotuning"),
        ((0, False, -1, ""), "", "ignored", "pass its --deepspeed_config"),
        ((0, True, 3, ""), "", "short", "lower autotuning.end_profile_step"),
        ((0, True, 0, ""), "", "short", "engine.backward(loss) and engine.step()"),
        ((-9, True, 3, ""), "", "killed", "Something outside ended it"),
        ((247, True, 3, ""), "", "killed", "Something outside ended it"),
        ((-15, True, 2, "no step ended"), "", "hung", "raise autotuning.trial_timeout"),
        ((-15, False, -1, "no engine was built"), "", "hung", "have it use its --deepspeed_config"),
    ],
)
def test_each_end_of_a_trial_says_what_to_do(ended: tuple[Any, ...], log: str, state: str, words: str) -> None:
    code, saw_engine, last_step, was_ended = ended
    found = outcome_of(Ended(code, 1.0, saw_engine, last_step, None, was_ended), None, log, last_step=5)
    assert found.state == state
    assert words in found.text()


RANK_1 = """---- rank 1 failed first (host a, pid 7): {ending} ----
[rank1]: Traceback (most recent call last):
[rank1]:     raise ValueError("a: b")
[rank1]: ValueError: a: b
failed after it: rank 0 (a)"""


@pytest.mark.parametrize(
    ("code", "log", "why"),
    [
        (1, RANK_1, "it ended with exit code 1 after step 2; rank 1 was the first: ValueError: a: b"),
        (3, RANK_1.partition("\n")[0], "it ended with exit code 3 after step 2; rank 1 was the first"),
        (247, RANK_1.partition("\n")[0], "it was killed (SIGKILL; rank 1 was the first)"),
        (1, "ValueError: no launcher", "it ended with exit code 1 after step 2"),
    ],
)
def test_of_a_trial_in_which_one_rank_fails_is_said_which_and_what_it_raised(code: int, log: str, why: str) -> None:
    found = outcome_of(Ended(code, 1.0, True, 2, None, ""), None, log.format(ending="exit code 1"), last_step=5)
    assert found.why == why


def test_of_a_long_log_the_line_that_says_who_failed_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "stderr.log"
    log.write_text("\n".join(["before", *RANK_1.splitlines()[:1], *map(str, range(30))]))
    assert tail(log).splitlines() == [RANK_1.splitlines()[0], *map(str, range(18, 30))]
    assert tail(tmp_path / "none") == ""
    log.write_text(f"{'.' * 9000} ValueError: no")
    assert len(tail(log)) < 600 and tail(log).endswith("ValueError: no"), "both ends of a long line"


@pytest.mark.parametrize(
    ("before", "after", "is_ignored"),
    [
        ([128, 128], [1024, 1024], False),
        ([128, 128], [128, 128], True),
        ([4 * 100], [4 * 130], True),  # the longest of other samples
        ([100], [5 * 130], False),
        ([128, 9], [1024, 9], False),  # a mask that all samples share
        ([128], [128, 128], False),  # another call: nobody can say
        ([], [], False),
    ],
)
def test_inputs_that_stay_as_large_while_the_micro_batch_grows_are_noticed(
    before: list[int], after: list[int], is_ignored: bool
) -> None:
    assert lessons.ignores_size((1, before), (8, after)) is is_ignored
    assert lessons.ignores_size((8, after), (1, before)) is is_ignored
    assert not lessons.ignores_size((8, before), (8, after))

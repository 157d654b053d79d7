"""Against tables worked out by hand."""

from __future__ import annotations

from math import log, sqrt

import pytest

from deepspeed.optim import schedule_formulas as formulas

HALF_ROOT = sqrt(0.5)


def test_a_range_test_grows_in_a_line_or_in_stairs() -> None:
    line = [formulas.range_test_factor(t, 4, 2.0, False) for t in range(-1, 5)]
    stairs = [formulas.range_test_factor(t, 4, 2.0, True) for t in range(-1, 5)]
    assert line == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert stairs == [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]


def test_a_cycle_rises_and_falls() -> None:
    factors = [formulas.cycle_factor(t, 2, 4) for t in range(-1, 6)]
    assert factors == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0])


def test_a_cycle_without_a_second_half_only_rises() -> None:
    assert [formulas.cycle_factor(t, 4, 0) for t in range(-1, 3)] == pytest.approx([0, 0.25, 0.5, 0.75])


def test_each_half_of_a_cycle_has_its_own_stairs() -> None:
    factors = [formulas.cycle_factor(t, 4, 4, 2, 1) for t in range(-1, 8)]
    assert factors == [0, 0, 0.5, 0.5, 1, 0, 0, 0, 0]


def test_decay_counts_from_the_end_of_the_cycle() -> None:
    assert [formulas.cycle_decay(t, 4, 0.5, 2) for t in range(2, 7)] == [0, 0, 0.25, 0.5, 0.75]
    assert formulas.cycle_decay(9, 4, 0.5, 0) == 0.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("log", [0, 0, 0.5, log(3) / log(4), 1, 1]), ("linear", [0, 0, 0.25, 0.5, 0.75, 1])],
)
def test_the_first_two_steps_of_a_warmup_are_at_the_minimum(kind: str, expected: list[float]) -> None:
    assert [formulas.warmup_factor(t, 4, kind) for t in range(-1, 5)] == pytest.approx(expected)


def test_a_warmup_is_never_shorter_than_two_steps() -> None:
    assert [formulas.warmup_factor(t, 1, "log") for t in range(-1, 3)] == [0, 0, 1, 1]


def test_decay_after_a_warmup_ends_at_zero_and_stays() -> None:
    factors = [formulas.warmup_decay_factor(t, 2, 6, "linear") for t in range(-1, 8)]
    assert factors == pytest.approx([0, 0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0])


def test_decay_shorter_than_the_warmup_divides_by_one() -> None:
    assert [formulas.warmup_decay_factor(t, 4, 3, "linear") for t in (3, 4, 5)] == [0.75, 0, 0]


def test_a_cosine_falls_from_one_to_its_minimum() -> None:
    factors = [formulas.warmup_cosine_factor(t, 2, 6, "linear", 0.2, 0.1) for t in range(-1, 7)]
    expected = [0, 0.2, 0.6, 0.1 + 0.45 * (1 + HALF_ROOT), 0.55, 0.1 + 0.45 * (1 - HALF_ROOT), 0.1, 0.1]
    assert factors == pytest.approx(expected)

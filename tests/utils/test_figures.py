"""Figures for people: the unit that a number calls for."""

from __future__ import annotations

import pytest

from deepspeed.utils.figures import count, many, nbytes, number, seconds


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234.5, "1,234.50 s"),
        (5.712, "5.71 s"),
        (1.0, "1.00 s"),
        (0.99996, "1.00 s"),
        (0.9999, "999.9 ms"),
        (0.0852, "85.2 ms"),
        (0.00099999, "1.0 ms"),
        (12e-6, "12.0 us"),
        (0.0, "0.0 us"),
    ],
)
def test_seconds_have_the_unit_that_they_call_for(value: float, shown: str) -> None:
    assert seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 FLOPs"), (999, "999 FLOPs"), (999.96, "1 KFLOPs"), (4.09e9, "4.09 GFLOPs"), (5e16, "50 PFLOPs")]
    + [(-4.09e9, "-4.09 GFLOPs"), (1.2345e19, "12,345 PFLOPs")],
)
def test_counts_of_a_unit_never_have_an_exponent(value: float, shown: str) -> None:
    assert number(value, "FLOPs") == shown
    assert number(1000) == "1 K"


def test_parameters_and_bytes_round_into_the_next_unit() -> None:
    assert [count(n) for n in (7, 999, 999_999, 3_410_000, 70.55e9)] == ["7", "999", "1.00M", "3.41M", "70.55B"]
    assert [nbytes(n) for n in (7, 999, 999_960, 3_200_000, 40.4e9)] == ["7 B", "999 B", "1.0 MB", "3.2 MB", "40.4 GB"]
    assert nbytes(40.44e9, 0) == "40 GB"


def test_a_noun_has_its_plural() -> None:
    assert [many(n, "node") for n in (1, 512, 1024)] == ["1 node", "512 nodes", "1,024 nodes"]

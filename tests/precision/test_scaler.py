"""The dynamic loss scale, as a table: overflow pattern ("x" overflow, "." clean) -> scale after each step."""

from __future__ import annotations

from typing import Any

import pytest

from deepspeed.precision import DynamicLossScale, LossScaleFloorError, StaticLossScale

TABLE = [
    ("halves at once without hysteresis", {"hysteresis": 1}, "xx.", "8 4 4"),
    ("tolerates hysteresis - 1 overflows", {"hysteresis": 3}, "xxxx", "16 16 8 4"),
    ("doubles after a window of clean steps", {"window": 2, "hysteresis": 1}, "......", "16 16 32 32 64 64"),
    ("counts the window from the overflow", {"window": 2, "hysteresis": 1}, ".x...", "16 8 8 8 16"),
    ("does not restore the tolerance by a clean step", {"hysteresis": 2}, "x.x", "16 16 8"),
    ("restores it if asked to", {"hysteresis": 2, "consecutive_hysteresis": True}, "x.xx", "16 16 16 8"),
    ("restores it by a doubling", {"window": 1, "hysteresis": 2}, "x..xx", "16 16 32 32 16"),
    ("stops at the floor", {"hysteresis": 1, "min_scale": 8.0}, "x.", "8 8"),
]


@pytest.mark.parametrize(
    ("arguments", "pattern", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_the_scale(arguments: dict[str, Any], pattern: str, expected: str) -> None:
    scale = DynamicLossScale(16.0, **arguments)
    seen = []
    for step in pattern:
        scale.update(step == "x")
        seen.append(f"{scale.scale:g}")
    assert " ".join(seen) == expected


def test_an_overflow_at_the_floor_is_an_error() -> None:
    scale = DynamicLossScale(1.0, hysteresis=1)
    with pytest.raises(LossScaleFloorError, match="Current loss scale already at minimum"):
        scale.update(True)


def test_state_continues_where_it_was_saved() -> None:
    first, second = (DynamicLossScale(16.0, window=3, hysteresis=2) for _ in range(2))
    for overflowed in (True, False, False):
        first.update(overflowed)
    second.load_state_dict(first.state_dict())
    for scale in (first, second):
        for overflowed in (False, True, True):
            scale.update(overflowed)
    assert first == second


def test_a_static_scale_never_changes() -> None:
    scale = StaticLossScale(128.0)
    scale.update(True)
    assert scale.scale == 128.0

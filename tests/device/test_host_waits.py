"""How often the host waits for the device in a step, in steady state; `tests/device/waits.py` prints where."""

from __future__ import annotations

import pytest

from tests.device.test_training import IS_WHOLE
from tests.device.waits import count_feature, count_on_ranks

NORM = "copy_ to the host in zero/norm.py"
"""The one wait that a step has to have: the host decides by the norm whether to step, and by how much gradients are clipped."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_forward_and_backward_never_wait_and_a_step_waits_for_the_norm(stage: int) -> None:
    sites = count_on_ranks(stage)
    assert (sites["forward"], sites["backward"]) == ([], [])
    assert [site.partition(":")[0] for site in sites["step"]] == [NORM]


@pytest.mark.parametrize(("stage", "optimizer", "param"), [(2, "cpu", "none"), (3, "cpu", "cpu")])
def test_copies_to_tiers_are_never_waited_for_in_forward_and_backward(stage: int, optimizer: str, param: str) -> None:
    sites = count_on_ranks(stage, optimizer, param)
    assert (sites["forward"], sites["backward"]) == ([], [])
    # An offloaded step waits for a tile's copy to the device before the CPU writes to that memory again, and once to learn
    # whether a script has written to parameters whose masters are elsewhere.
    others = {site.partition(":")[0] for site in sites["step"]} - {NORM}
    assert others <= {"event.synchronize in tiers/rest.py", "copy_ to the host in zero/takeover.py"}


LAYERS = "copy_ to the host in parallel/expert/dispatch.py"


@pytest.mark.parametrize(
    ("feature", "expected"), [("tensor", {NORM: 1}), ("experts", {NORM: 1, LAYERS: 2})], ids=["tensor", "experts"]
)
def test_split_models_wait_for_the_norm_and_for_each_exchange_of_counts(feature: str, expected: dict[str, int]) -> None:
    assert count_feature(feature, 3) == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_in_tiles_waits_for_the_norm_alone(stage: int) -> None:
    assert count_feature("tiles", stage) == {NORM: 1}


@pytest.mark.skipif(not IS_WHOLE, reason="make test-device counts these too")
@pytest.mark.parametrize("feature", ["chunks", "hidden_away"])
def test_what_rests_in_main_memory_waits_for_the_norm_alone(feature: str) -> None:
    assert count_feature(feature, 1) == {NORM: 1}

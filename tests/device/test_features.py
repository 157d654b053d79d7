"""What splits a model or compresses its bytes has, on the simulated device, the bits of the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.device.features import FEATURES, NUM_RANKS
from tests.device.test_training import IS_WHOLE
from tests.harness import run_ranks

SOME = ("tensor", "pipeline", "experts")
CASES = [
    (name, stage)
    for name, (_, stages) in FEATURES.items()
    if IS_WHOLE or name in SOME
    for stage in (stages if IS_WHOLE else stages[-1:])
]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_dimension_has_the_bits_of_the_cpu(name: str, stage: int) -> None:
    run = FEATURES[name][0]
    found, expected = (run_ranks(NUM_RANKS.get(name, 2), run, stage, device=device) for device in ("sim", "cpu"))
    for (losses, weights), (true_losses, true_weights) in zip(found, expected, strict=True):
        assert losses == true_losses
        assert weights.keys() == true_weights.keys()
        assert [name for name, weight in true_weights.items() if not torch.equal(weights[name], weight)] == []

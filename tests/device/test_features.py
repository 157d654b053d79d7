"""What splits a model or compresses its bytes has, on the simulated device, the bits of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.device.features import FEATURES, NUM_RANKS, generated, streamed
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


@pytest.mark.skipif(not IS_WHOLE, reason="the quantised one goes the same way; make test-device runs both")
def test_an_inference_engine_has_the_logits_and_the_words_of_the_cpu() -> None:
    found, expected = (run_ranks(1, generated, "fp32", device=device)[0] for device in ("sim", "cpu"))
    assert torch.equal(found["words"], expected["words"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not IS_WHOLE, reason="three engines of the same kind; make test-device runs them")
@pytest.mark.parametrize(("ranks", "tier"), [(1, "cpu"), (1, "nvme"), (2, "none")])
def test_streamed_inference_has_the_logits_and_the_words_of_the_cpu(ranks: int, tier: str, tmp_path: Path) -> None:
    found, expected = (
        run_ranks(ranks, streamed, tier, str(tmp_path / device), device=device)[0] for device in ("sim", "cpu")
    )
    assert torch.equal(found["words"], expected["words"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-6, atol=1e-6)


def test_quantised_inference_computes_on_the_device() -> None:
    found, expected = (run_ranks(1, generated, "int8", device=device)[0] for device in ("sim", "cpu"))
    assert torch.equal(found["words"], expected["words"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-3, atol=1e-4)

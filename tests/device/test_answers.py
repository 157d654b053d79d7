"""Inference engines on the simulated device answer what they do on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.device.answers import generated, over_ranks, streamed
from tests.device.test_training import IS_WHOLE
from tests.harness import run_ranks


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


@pytest.mark.skipif(not IS_WHOLE, reason="one rank's engine goes the same way; make test-device runs both")
@pytest.mark.parametrize("dim", ["tp", "ep"])
def test_an_engine_over_ranks_has_the_logits_and_the_words_of_the_cpu(dim: str) -> None:
    found, expected = (run_ranks(2, over_ranks, dim, device=device) for device in ("sim", "cpu"))
    for here, true in zip(found, expected, strict=True):
        assert torch.equal(here["words"], true["words"])
        torch.testing.assert_close(here["logits"], true["logits"], rtol=1e-6, atol=1e-6)

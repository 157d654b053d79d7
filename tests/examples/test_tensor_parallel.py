"""The example of tensor parallelism has the losses of whole layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.harness import run_ranks

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tensor_parallel" / "train.py"


def run(rank: int, world: int, words: str) -> list[float]:
    """The example's `main`."""
    spec = importlib.util.spec_from_file_location("tensor_parallel_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(f"--steps 4 --width 32 {words}".split())


def test_layers_cut_over_two_ranks_have_the_losses_of_whole_ones() -> None:
    whole, same = run_ranks(2, run, "--tp 1", timeout=180.0)
    assert whole == same
    for losses in (*run_ranks(2, run, "--tp 2"), *run_ranks(2, run, "--tp 2 --stage 3 --cut-logits")):
        assert losses == pytest.approx(whole, rel=1e-5)

"""Training over parts of sequences equals plain PyTorch on whole ones: loss and gradients, at every stage, by every recipe."""

from __future__ import annotations

import os
from typing import Any

import pytest
from torch import Tensor

from tests.harness import run_ranks
from tests.parallel.sequence import runs

WHEN_LONG = pytest.mark.skipif(os.environ.get("DS_TEST_LONG") != "1", reason="the whole matrix: make test-sequence")


def check(
    world: int,
    size: int,
    stage: int,
    recipe: str,
    kind: str = "packed",
    *,
    samples: int = 1,
    length: int = 16,
    **model: Any,
) -> None:
    """Every rank's reduced gradients equal those of one process on all batches; so does the joined loss."""
    batches = [runs.batch_of(kind, length, samples, seed=3 + i) for i in range(world // size)]
    loss, gradients = runs.plain(runs.tiny_model(**model), batches)
    found: list[tuple[float, dict[str, Tensor]]] = run_ranks(world, runs.train, size, stage, batches, recipe, model)
    for _, own in found:
        assert runs.ratio(own, gradients) == pytest.approx(1.0, abs=1e-5)
        assert runs.largest_error(own, gradients) < 1e-5
    if recipe in ("gathered", "reduced"):
        assert sum(own for own, _ in found) / world == pytest.approx(loss, rel=1e-6)


RECIPES = ("gathered", "reduced", "own", "labels")


@pytest.mark.parametrize(
    ("stage", "recipe"),
    [
        pytest.param(stage, recipe, marks=[] if (stage + i) % 2 == 0 else WHEN_LONG)
        for stage in range(4)
        for i, recipe in enumerate(RECIPES)
    ],
)
def test_gradients_are_those_of_one_process_whatever_the_script_does_with_its_losses(stage: int, recipe: str) -> None:
    check(2, 2, stage, recipe)


@pytest.mark.parametrize("kind", ["plain", "padded", "left", "holes"])
def test_masks_and_batches_of_three(kind: str) -> None:
    check(2, 2, 2, "own", kind, samples=3)


@pytest.mark.parametrize(("heads", "kv"), [(3, 3), (4, 1), (9, 3)])
def test_odd_lengths_and_heads_that_do_not_divide(heads: int, kv: int) -> None:
    check(2, 2, 3, "own", length=17, samples=2, heads=heads, kv=kv)


@pytest.mark.parametrize("kind", ["packed", "left"])
def test_sliding_windows(kind: str) -> None:
    check(2, 2, 1, "own", kind, samples=2, length=20, model_type="mistral", sliding_window=5)


@pytest.mark.parametrize(
    ("world", "kv", "kind", "more"),
    [
        (2, 1, "packed", {}),
        pytest.param(2, 1, "left", {}, marks=WHEN_LONG),
        pytest.param(2, 1, "holes", {}, marks=WHEN_LONG),
        (2, 1, "plain", {"model_type": "mistral", "sliding_window": 5}),
        pytest.param(3, 2, "packed", {}, marks=WHEN_LONG),
        (4, 2, "plain", {}),
    ],
)
def test_more_ranks_than_key_heads_share_a_ring(world: int, kv: int, kind: str, more: dict[str, Any]) -> None:
    check(world, world, 2, "own", kind, length=17, samples=2, heads=4, kv=kv, **more)


def test_data_and_sequence_parallel_together() -> None:
    check(4, 2, 3, "reduced")


@WHEN_LONG
@pytest.mark.parametrize("kind", ["packed", "padded", "left"])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("length", [24, 25])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_whole_matrix(stage: int, size: int, length: int, samples: int, kind: str) -> None:
    check(size, size, stage, "gathered", kind, samples=samples, length=length, heads=8, kv=4)
    check(size, size, stage, "own", kind, samples=samples, length=length, heads=8, kv=2)

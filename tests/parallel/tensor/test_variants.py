"""Less usual ways to train with layers cut over ranks equal plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import run_ranks
from tests.parallel.tensor import variants
from tests.parallel.tensor.models import LONG

pytest.importorskip("transformers")


def long(*values: Any) -> Any:
    """Of the long matrix."""
    return pytest.param(*values, marks=LONG)


@pytest.mark.parametrize(
    ("ranks", "stage", "ignored"),
    [
        (3, 0, "some"),
        (2, 3, "all but one"),
        long(3, 0, "all but one"),
        long(3, 0, "all of a sample"),
        long(2, 3, "some"),
        long(2, 3, "all of a sample"),
    ],
)
def test_a_tied_head_cut_over_the_vocabulary_ignores_what_is_to_be_ignored(
    ranks: int, stage: int, ignored: str
) -> None:
    run_ranks(ranks, variants.vocabulary, stage, ignored)


WAYS = ("no_targets", "items_in_batch", "adapters", "frozen", "two_models", "generates")
SIZES = ((3, 1), (2, 3), (4, 0))
"""(ranks, ZeRO stage)"""


@pytest.mark.parametrize(
    ("what", "ranks", "stage"),
    [(way, *size) if size == SIZES[i % 2] else long(way, *size) for i, way in enumerate(WAYS) for size in SIZES],
)
def test_ways_of_scripts_equal_plain_pytorch(what: str, ranks: int, stage: int) -> None:
    run_ranks(ranks, getattr(variants, what), stage)


@pytest.mark.parametrize(
    ("ranks", "stage", "section"),
    [
        (3, 2, {}),
        long(2, 3, {"tp_overlap_comm": True}),
        long(2, 1, {"vocab_parallel_lm_head": True}),
        long(4, 0, {}),
    ],
)
def test_clipped_steps_of_a_clients_groups_equal_plain_pytorch(ranks: int, stage: int, section: dict[str, Any]) -> None:
    run_ranks(ranks, variants.clipped, stage, section)


@pytest.mark.parametrize("stage", [long(0), 3])
def test_tensor_groups_may_have_batches_of_other_sizes_and_lengths(stage: int) -> None:
    run_ranks(4, variants.lengths, stage)


@LONG
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_equal_plain_pytorch(name: str) -> None:
    run_ranks(2, variants.encoders, name)


def test_dropout_beside_recomputed_blocks_leaves_equal_bits() -> None:
    run_ranks(2, variants.dropped)


def test_a_model_without_values_is_told_how_to_get_them() -> None:
    run_ranks(2, variants.without_values)


FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 48}),
    ("qwen3", {"num_attention_heads": 7, "num_key_value_heads": 7, "hidden_size": 56, "intermediate_size": 5}),
    ("phi", {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 40, "intermediate_size": 51}),
    ("gemma3_text", {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 4}),
    ("cohere2", {"num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 4}),
    ("glm", {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}),
)


@LONG
@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize(("name", "changes"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_heads_fewer_than_ranks_and_sizes_that_divide_by_nothing(
    name: str, changes: dict[str, Any], ranks: int
) -> None:
    run_ranks(ranks, variants.family, 2, name, changes)

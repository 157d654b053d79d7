"""Less usual ways to train with parts of sequences equal plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import run_ranks
from tests.parallel.sequence import variants
from tests.parallel.sequence.test_training import WHEN_LONG

pytest.importorskip("transformers")


def long(*values: Any) -> Any:
    """Of the whole matrix."""
    return pytest.param(*values, marks=WHEN_LONG)


@pytest.mark.parametrize(
    ("ranks", "stage", "heads", "kv", "kind", "length"),
    [
        (3, 3, 4, 1, "packed", 23),
        long(4, 2, 6, 2, "packed", 29),
        long(2, 0, 5, 5, "left", 17),
        long(3, 1, 7, 7, "padded", 25),
        long(4, 3, 4, 2, "holes", 21),
    ],
)
def test_tiles_recomputed_blocks_tied_heads_and_odd_lengths_go_together(
    ranks: int, stage: int, heads: int, kv: int, kind: str, length: int
) -> None:
    run_ranks(ranks, variants.everything_at_once, stage, heads, kv, kind, length)


WAYS = ("adapters", "accumulate", "clipped", "positions_of_one_row", "embedded", "two_forwards", "no_targets")


@pytest.mark.parametrize(
    ("what", "stage"),
    [
        (way, stage) if stage == (0, 2, 3)[i % 3] else long(way, stage)
        for i, way in enumerate(WAYS)
        for stage in (0, 2, 3)
    ],
)
def test_ways_of_scripts_equal_plain_pytorch(what: str, stage: int) -> None:
    run_ranks(2, getattr(variants, what), stage)


@pytest.mark.parametrize("recipe", ["labels", long("own"), "gathered", long("reduced")])
def test_targets_that_lie_on_one_rank_count_once(recipe: str) -> None:
    run_ranks(3, variants.targets_on_one_rank, 1, recipe)


@pytest.mark.parametrize("stage", [long(2), 3])
def test_heads_that_do_not_divide_in_half_precision_with_everything_in_main_memory(stage: int) -> None:
    run_ranks(3, variants.half_precision, stage)


_MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1,
    "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
    "first_k_dense_replace": 1, "kv": 4,
}  # fmt: skip
FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen2", {"kv": 1}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gpt_neox", {}),
    ("opt", {"dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("qwen3", {}),
    ("gemma3_text", {"sliding_window": 6}),
    ("olmo2", {}),
    ("phi3", {"pad_token_id": 0}),
    ("starcoder2", {"sliding_window": 5}),
    ("smollm3", {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    ("cohere2", {"sliding_window": 6}),
    ("glm4", {"pad_token_id": 0}),
    ("deepseek_v3", _MLA),
)


@WHEN_LONG
@pytest.mark.parametrize(("family", "more"), FAMILIES, ids=lambda value: value if isinstance(value, str) else "")
def test_families_equal_plain_pytorch(family: str, more: dict[str, Any]) -> None:
    run_ranks(2, variants.other_kinds, family, more)


def test_an_encoder_sees_all_tokens() -> None:
    run_ranks(2, variants.encoder)

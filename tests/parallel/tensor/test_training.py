"""Training with layers cut over ranks equals one process with plain PyTorch, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.parallel.tensor import families, runs
from tests.parallel.tensor.models import LONG

pytest.importorskip("transformers")


def check(results: list[dict[str, float]]) -> None:
    for found in results:
        assert found["cut"] > 0
        assert found["loss"] < 1e-6, found
        assert found["norm"] < 1e-6, found
        assert found["grad"] < 1e-5, found


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen3", {}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("phi3", {}),
    ("persimmon", {"num_key_value_heads": 4}),
    families.FAMILIES["gpt2, five heads"],
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda v: str(v))
def test_loss_gradients_and_norm_are_one_processs(family: str, changes: dict[str, Any]) -> None:
    check(run_ranks(2, runs.compare, family, 2, 1, changes))


REFUSED = (("codegen", 3), ("falcon, several heads", 4))


@LONG
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_is_one_processs(name: str, ranks: int) -> None:
    if (name, ranks) in REFUSED:
        pytest.skip("refused by name: test_refused.py")
    family, changes = families.FAMILIES[name]
    check(run_ranks(ranks, runs.compare, family, ranks, 0, changes))


def test_heads_and_widths_that_do_not_divide_are_cut_unevenly() -> None:
    family, changes = families.FAMILIES["qwen2_moe"]
    check(run_ranks(2, runs.compare, family, 2, 2, changes))


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_that_stay_cut_give_the_same_loss_and_gradients(is_tied: bool) -> None:
    changes = {"tie_word_embeddings": is_tied, "vocab_size": 97}
    check(run_ranks(2, runs.compare, "llama", 2, 2, changes, {"vocab_parallel_lm_head": True}))


def test_rules_of_a_user_gather_outputs_and_cut_embeddings_over_their_words() -> None:
    columns, rows = r".*(self_attn\.[qkv]|mlp\.gate|mlp\.up)_proj\.weight$", r".*(o|down)_proj\.weight$"
    specs = [
        {"patterns": [columns]},
        {"patterns": [rows], "partition_type": "row"},
        {"patterns": [r"lm_head\.weight$"], "gather_output": True},
        {"patterns": [r".*embed_tokens\.weight$"]},
    ]
    plan = {"layer_specs": specs, "use_default_specs": False, "embedding_partition_dim": 0, "tp_size": 2}
    check(run_ranks(2, runs.compare, "llama", 2, 2, {"vocab_size": 97}, {"partition_config": plan}))


def test_a_layer_sends_what_the_formula_says() -> None:
    counted = [max(run_ranks(2, runs.count_bytes, layers, {})) for layers in (1, 2)]
    assert counted[1] - counted[0] == 8 * (2 - 1) // 2 * (2 * 8 * 32) * 4


@LONG
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_layer_sends_what_the_formula_says_at_every_size(ranks: int) -> None:
    one, three = (set(run_ranks(ranks, runs.count_bytes, layers, {})) for layers in (1, 3))
    num_layers, num_sums, nbytes = 2, 4, 2 * 8 * 32 * 4
    assert max(three) - max(one) == num_layers * num_sums * (2 * nbytes * (ranks - 1) // ranks)  # each in whole bytes


@pytest.mark.parametrize("stages", [(0, 3), pytest.param((0, 1, 2, 3), marks=LONG)])
def test_zero_stages_are_bit_equal_to_one_another_beside_tensor_parallelism(stages: tuple[int, ...]) -> None:
    by_stage = [run_ranks(4, runs.train, "llama", 2, stage, {}) for stage in stages]
    for stage, found in zip(stages, by_stage, strict=True):
        for (losses, weights), (expected_losses, expected) in zip(found, by_stage[0], strict=True):
            assert losses == expected_losses
            for name, value in expected.items():
                assert torch.equal(weights[name], value), f"{name} at stage {stage}"


@pytest.mark.parametrize("steps", [5, pytest.param(1000, marks=LONG)])
def test_what_is_not_cut_has_the_same_bits_on_all_ranks(steps: int) -> None:
    first, *others = run_ranks(2, runs.train_long, steps, timeout=500.0)
    assert any("norm" in name for name in first)
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True, "initial_scale_power": 8}},
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
        {"gradient_accumulation_steps": 2},
        {"tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_precisions_offload_and_accumulation_train_beside_it(more: dict[str, Any]) -> None:
    expected, _ = run_ranks(1, runs.train, "llama", 1, 2, {k: v for k, v in more.items() if k != "tensor_parallel"})[0]
    tolerance = 2e-2 if {"bf16", "fp16"} & set(more) else 1e-5
    for losses, _ in run_ranks(2, runs.train, "llama", 2, 2, more):
        assert losses == pytest.approx(expected, rel=tolerance)


def test_ranks_that_read_different_data_are_told_so_by_the_contracts_words() -> None:
    run_ranks(2, runs.read_different_data)


@pytest.mark.parametrize(
    "stage", [1, pytest.param(0, marks=LONG), pytest.param(2, marks=LONG), pytest.param(3, marks=LONG)]
)
@pytest.mark.parametrize("tp", [2, pytest.param(1, marks=LONG)])
def test_an_optimizer_that_stepped_first_goes_on_with_the_parts(stage: int, tp: int) -> None:
    run_ranks(2, runs.optimizer_first, stage, tp)


def test_a_model_that_zero_init_sharded_is_cut() -> None:
    check(run_ranks(2, runs.compare_under_init))


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=LONG)])
def test_no_rank_has_the_whole_of_a_model_that_zero_init_sharded(ranks: int) -> None:
    for cutting, building in run_ranks(ranks, runs.peaks_of_building):
        assert cutting < 0.75  # a part, the largest parameter, and what is on its way
        assert building < 1 / ranks + 0.2


def test_adapters_train_beside_cut_layers() -> None:
    pytest.importorskip("peft")
    run_ranks(2, runs.compare_adapters)


def test_checkpointed_activations_change_nothing() -> None:
    run_ranks(2, runs.compare_checkpointed)

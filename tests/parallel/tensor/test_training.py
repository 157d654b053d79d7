"""Training with layers cut over ranks equals one process with plain PyTorch, at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import run_ranks
from tests.parallel.tensor import runs

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
]


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=lambda v: str(v))
def test_loss_gradients_and_norm_are_one_processs(family: str, changes: dict[str, Any]) -> None:
    check(run_ranks(2, runs.compare, family, 2, 1, changes))


def test_heads_and_widths_that_do_not_divide_are_cut_unevenly() -> None:
    check(run_ranks(3, runs.compare, "llama", 3, 2, {"intermediate_size": 50}))


def test_zero_stages_are_bit_equal_to_one_another_beside_tensor_parallelism() -> None:
    first = run_ranks(4, runs.train, "llama", 2, 0, {})
    for stage in (1, 2, 3):
        for (losses, weights), (expected_losses, expected) in zip(
            run_ranks(4, runs.train, "llama", 2, stage, {}), first, strict=True
        ):
            assert losses == expected_losses
            for name, value in expected.items():
                assert torch.equal(weights[name], value), f"{name} at stage {stage}"


def test_what_is_not_cut_has_the_same_bits_on_all_ranks() -> None:
    for _, weights in (results := run_ranks(2, runs.train, "qwen3", 2, 2, {}, steps=5))[1:]:
        for name, value in weights.items():
            if "norm" in name:
                assert torch.equal(value, results[0][1][name]), name


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


def test_an_optimizer_that_came_first_goes_on_with_the_parts() -> None:
    run_ranks(2, runs.optimizer_first)


def test_a_model_that_zero_init_sharded_is_cut() -> None:
    check(run_ranks(2, runs.compare_under_init))


def test_adapters_train_beside_cut_layers() -> None:
    pytest.importorskip("peft")
    run_ranks(2, runs.compare_adapters)


def test_checkpointed_activations_change_nothing() -> None:
    run_ranks(2, runs.compare_checkpointed)

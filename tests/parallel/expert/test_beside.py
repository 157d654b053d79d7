"""Spread experts of a Hugging Face model beside what else changes a step: each equals the plain model in one process."""

from __future__ import annotations

import pytest

from tests.harness import run_ranks
from tests.parallel.expert.hf import compare, plain, train
from tests.parallel.expert.models import LONG

pytest.importorskip("transformers")


@pytest.mark.parametrize("how", ["recomputed", pytest.param("re-entrant", marks=LONG)])
@pytest.mark.parametrize("stage", [pytest.param(0, marks=LONG), 2, 3])
def test_recomputed_blocks_exchange_their_tokens_again(how: str, stage: int) -> None:
    compare(run_ranks(2, train, "qwen3_moe", 2, stage, how=how), plain("qwen3_moe", 2))


@pytest.mark.parametrize("stage", [pytest.param(0, marks=LONG), 2, pytest.param(3, marks=LONG)])
def test_micro_batches_of_a_step_add_up(stage: int) -> None:
    compare(run_ranks(2, train, "mixtral", 2, stage, parts=2), plain("mixtral", 2))


@pytest.mark.parametrize("family", ["mixtral", pytest.param("deepseek_v3", marks=LONG)])
@pytest.mark.parametrize("stage", [pytest.param(0, marks=LONG), pytest.param(1, marks=LONG), 2, 3])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=LONG)])
def test_adapters_on_experts_are_spread_with_them(family: str, stage: int, ranks: int) -> None:
    pytest.importorskip("peft")
    compare(run_ranks(ranks, train, family, 2, stage, how="adapted"), plain(family, ranks, how="adapted"))

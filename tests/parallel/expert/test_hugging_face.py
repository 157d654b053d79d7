"""Models of Hugging Face with spread experts equal the plain models in one process."""

from __future__ import annotations

import pytest

from tests.harness import run_ranks
from tests.parallel.expert.hf import FAMILIES, compare, plain, train
from tests.parallel.expert.models import LONG

pytest.importorskip("transformers")


SHORT = ("qwen2_moe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("family", [f if f in SHORT else pytest.param(f, marks=LONG) for f in FAMILIES])
def test_a_family_with_experts_on_two_ranks_equals_the_plain_model(family: str) -> None:
    compare(run_ranks(2, train, family, 2, 2), plain(family, 2))


@pytest.mark.parametrize(("ep", "stage"), [(1, 0), pytest.param(2, 0, marks=LONG), (2, 3)])
def test_other_placements_of_one_family_equal_it_too(ep: int, stage: int) -> None:
    compare(run_ranks(2, train, "mixtral", ep, stage), plain("mixtral", 2))

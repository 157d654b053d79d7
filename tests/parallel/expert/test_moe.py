"""`MoE` layers equal a dense loop over all experts, wherever the experts are."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness import run_ranks
from tests.parallel.expert.models import LONG
from tests.parallel.expert.runs import compare, plain, train


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("ranks", "ep", "k"), [(2, 2, 2), pytest.param(2, 1, 2, marks=LONG), pytest.param(2, 2, 1, marks=LONG)]
)
def test_training_equals_a_dense_loop_in_one_process(ranks: int, ep: int, k: int, stage: int) -> None:
    compare(run_ranks(ranks, train, ep, k, stage), plain(ranks, k))


@pytest.mark.parametrize(
    ("stage", "k", "extra"), [(0, 3, {}), pytest.param(3, 2, {}, marks=LONG), (2, 2, {"use_residual": True})]
)
def test_experts_on_two_of_four_ranks_and_their_copies_on_the_others_equal_it_too(
    stage: int, k: int, extra: dict[str, Any]
) -> None:
    compare(run_ranks(4, train, 2, k, stage, extra), plain(4, k, **extra))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=LONG), 3])
def test_offloaded_experts_equal_it_too(stage: int) -> None:
    zero = {"offload_optimizer": {"device": "cpu"}}
    extra = {"zero": zero, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    compare(run_ranks(2, train, 2, 2, stage, extra), plain(2, 2))

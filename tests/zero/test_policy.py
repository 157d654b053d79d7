"""The placement table, compared as text."""

from __future__ import annotations

import pytest
import torch

from deepspeed.zero.policy import SHARD_DIMS, Placement, ZeroPolicy, policy_of_stage

TABLE = """
stage parameters  gradients   optimizer
0     replicated  replicated  replicated
1     replicated  replicated  dp_shard+sp
2     replicated  dp_shard+sp dp_shard+sp
3     dp_shard+sp dp_shard+sp dp_shard+sp
"""


def place(placement: Placement) -> str:
    return "+".join(placement.sharded_over) or "replicated"


def test_the_four_stages_are_the_four_rows_of_the_table() -> None:
    rows = ["stage parameters  gradients   optimizer"]
    for stage in range(4):
        policy = policy_of_stage(stage)
        kinds = (policy.parameters, policy.gradients, policy.optimizer)
        rows.append(f"{stage:<6}" + "".join(f"{place(kind):<12}" for kind in kinds).rstrip())
    assert "\n".join(rows) == TABLE.strip()


def test_what_is_sharded_on_the_left_must_be_sharded_on_the_right() -> None:
    sharded, replicated = Placement(sharded_over=SHARD_DIMS), Placement()
    with pytest.raises(AssertionError, match="is sharded where"):
        ZeroPolicy(parameters=sharded, gradients=replicated, optimizer=sharded)
    with pytest.raises(AssertionError, match="is sharded where"):
        ZeroPolicy(parameters=replicated, gradients=sharded, optimizer=replicated)


def test_a_master_is_separate_only_where_its_dtype_is_another() -> None:
    assert not policy_of_stage(1).has_separate_master
    assert policy_of_stage(1, param_dtype=torch.bfloat16).has_separate_master


def test_a_sharded_placement_costs_each_rank_its_share() -> None:
    assert Placement(dtype=torch.bfloat16).bytes_per_rank(1000, 4) == 2000
    assert Placement(sharded_over=SHARD_DIMS).bytes_per_rank(1000, 4) == 1000

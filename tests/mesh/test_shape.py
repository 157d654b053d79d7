"""Which ranks share what, compared as text, and as properties of any shape."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from deepspeed.mesh import marks
from deepspeed.mesh.marks import Cut, Expert, Mark
from deepspeed.mesh.shape import DIMS, ROLES, Dim, MeshShape, Over, Role, shape_in_shard_groups
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

PACKAGE = Path(__file__).resolve().parent.parent.parent / "deepspeed"

CUBE = MeshShape(dp_replicate=2, dp_shard=2, tp=2)
STAGES = MeshShape(pp=2, dp_shard=2, tp=2, sp=1)
SEQUENCES = MeshShape(dp_shard=2, sp=2, tp=2)
EIGHT = MeshShape(dp_replicate=2, dp_shard=4, near=2)
SIXTEEN = MeshShape(dp_shard=8, tp=2, ep=4)
FOLDED = MeshShape(dp_shard=4, tp=2, ep=4, folds_tp=True)


def as_text(shape: MeshShape, over: Over) -> str:
    return " ".join("".join(f"{rank:x}" for rank in ranks) for ranks in shape.groups(over))


@pytest.mark.parametrize(
    ("shape", "over", "expected"),
    [
        (CUBE, "tensor", "01 23 45 67"),
        (CUBE, "shard", "02 13 46 57"),
        (CUBE, "replicate", "04 15 26 37"),
        (CUBE, "batch", "0246 1357"),
        (CUBE, "norm", "0123 4567"),
        (CUBE, "job", "01234567"),
        (STAGES, "pipeline", "04 15 26 37"),
        (STAGES, "average", "02 13 46 57"),
        (STAGES, "model", "0145 2367"),
        (STAGES, "norm", "01234567"),
        (SEQUENCES, "sequence", "02 13 46 57"),
        (SEQUENCES, "batch", "04 15 26 37"),
        (SEQUENCES, "average", "0246 1357"),
        (SEQUENCES, ("sp", "tp"), "0123 4567"),
        (EIGHT, "average", "01234567"),
        (EIGHT, "shard", "0123 4567"),
        (EIGHT, "replicate", "04 15 26 37"),
        (EIGHT, "near", "01 23 45 67"),
        (EIGHT, "far", "02 13 46 57"),
        (SIXTEEN, "experts", "0246 1357 8ace 9bdf"),
        (SIXTEEN, "expert_shard", "08 19 2a 3b 4c 5d 6e 7f"),
        (MeshShape(dp_shard=8, tp=2, ep=4, data_first=True), "experts", "048c 159d 26ae 37bf"),
        (MeshShape(dp_shard=8, tp=2, ep=4, data_first=True), "expert_shard", "02 13 46 57 8a 9b ce df"),
        (FOLDED, "tensor", "01 23 45 67"),
        (FOLDED, "average", "0246 1357"),
        (FOLDED, "experts", "0123 4567"),
        (FOLDED, "expert_shard", "04 15 26 37"),
        (MeshShape(pp=2, dp_shard=4, ep=2), "experts", "01 23 45 67"),
        (MeshShape(pp=2, dp_shard=4, ep=2), "expert_shard", "02 13 46 57"),
        (MeshShape(dp_shard=3), "replicate", "0 1 2"),
        (MeshShape(dp_shard=2, tp=2, order=(0, 2, 1, 3)), "shard", "01 23"),
        (MeshShape(dp_shard=2, tp=2, order=(0, 2, 1, 3)), "tensor", "02 13"),
    ],
)
def test_groups(shape: MeshShape, over: Over, expected: str) -> None:
    assert as_text(shape, over) == expected


def shapes() -> list[MeshShape]:
    found = []
    for pp, replicate, shard, sp, tp, ep, near in itertools.product(
        (1, 2), (1, 2), (1, 3, 4), (1, 2), (1, 2), (1, 2), (1, 2)
    ):
        for data_first, folds in itertools.product((False, True), repeat=2):
            among = replicate * shard * sp * (tp if folds else 1)
            if among % ep or shard * sp % near:
                continue
            order = tuple(reversed(range(pp * replicate * shard * sp * tp))) if data_first else None
            sizes: dict[str, Any] = {"pp": pp, "dp_replicate": replicate, "dp_shard": shard, "sp": sp, "tp": tp}
            found.append(MeshShape(**sizes, ep=ep, near=near, data_first=data_first, folds_tp=folds, order=order))
    return found


@pytest.mark.parametrize("role", ROLES)
def test_the_groups_of_a_role_partition_the_ranks_and_each_rank_finds_its_own(role: Role) -> None:
    for shape in shapes():
        groups = shape.groups(role)
        assert sorted(itertools.chain(*groups)) == list(range(shape.world_size))
        assert {len(ranks) for ranks in groups} == {shape.size(role)}
        assert all(shape.ranks(role, rank) == ranks for ranks in groups for rank in ranks)


def test_sharding_and_repeating_make_up_averaging_and_experts_do_too() -> None:
    for shape in shapes():
        assert shape.size("shard") * shape.size("replicate") == shape.size("average")
        assert shape.size("near") * shape.size("far") == shape.size("shard")
        lanes = shape.tp if shape.folds_tp else 1
        assert shape.size("experts") * shape.size("expert_shard") == shape.size("average") * lanes
        assert shape.size("average") * shape.size("model") == shape.size("job")


def test_every_role_and_every_dim_has_its_row() -> None:
    assert set(ROLES) == set(get_args(Role))
    assert {dim for dims in ROLES.values() for dim in dims} == set(get_args(Dim))


def test_roles_over_the_same_ranks_have_the_same_dims() -> None:
    shape = MeshShape(dp_shard=4)
    assert shape.dims("batch") == shape.dims("average") == shape.dims("job") == shape.dims("shard") == ("dp_shard",)
    assert shape.dims("model") == ()


def test_a_group_of_thousands_of_ranks_is_found_without_listing_all_groups() -> None:
    shape = MeshShape(pp=8, dp_replicate=4, dp_shard=32, sp=2, tp=8)
    assert shape.world_size == 16384
    assert shape.ranks("tensor", 16383) == tuple(range(16376, 16384))
    assert shape.ranks("shard", 5)[:3] == (5, 13, 21)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp_shard": 6, "ep": 4}, "expert parallel size 4 does not divide the 6 ranks"),
        ({"dp_shard": 4, "near": 3}, "zero_hpz_partition_size = 3 does not divide the 4 ranks"),
    ],
)
def test_a_size_that_does_not_divide_is_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(DeepSpeedConfigError, match=message):
        MeshShape(**sizes)  # type: ignore[arg-type]


def test_shard_groups_hold_whole_sequences() -> None:
    assert shape_in_shard_groups(8, 4, sp=2) == MeshShape(dp_replicate=2, dp_shard=2, sp=2)
    with pytest.raises(DeepSpeedConfigError, match="mics_shard_size = 1 is not a multiple of the 2 ranks that share"):
        shape_in_shard_groups(8, 1, sp=2)


# A parameter's own dims. ---------------------------------------------------------------------------------------------


def test_an_unmarked_parameter_counts_on_the_first_tensor_rank_and_a_cut_one_on_all() -> None:
    shape = MeshShape(pp=2, dp_shard=1, tp=2)
    whole, cut = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    marks.mark(cut, Mark(cuts=(Cut("tp", 0, ((4, 8),), 8),)))
    tied = nn.Parameter(torch.zeros(4))
    marks.mark(tied, Mark(repeated_over=("pp",)))
    counted = {
        name: [rank for rank in range(4) if marks.of(param).counts_here(shape, rank)]
        for name, param in {"whole": whole, "cut": cut, "tied": tied}.items()
    }
    assert counted == {"whole": [0, 2], "cut": [0, 1, 2, 3], "tied": [0]}


def test_a_mark_is_set_once_and_has_to_fit() -> None:
    param = nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(
        DeepSpeedError, match=r"shape \(4, 2\) cannot hold the indices \[\(0, 3\)\] of dimension 0: they are 3"
    ):
        marks.mark(param, Mark(cuts=(Cut("tp", 0, ((0, 3),)),)))
    marks.mark(param, Mark(expert=Expert(1, 4)))
    marks.mark(param, Mark(expert=Expert(1, 4)))
    with pytest.raises(DeepSpeedError, match="is marked .* already"):
        marks.mark(param, Mark(expert=Expert(2, 4)))


def test_megatron_s_attribute_is_a_cut_of_unknown_position() -> None:
    param = nn.Parameter(torch.zeros(4))
    assert marks.of(param) is marks.PLAIN
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    assert marks.of(param).cut_over == ("tp",)


# Only here are dims named. -------------------------------------------------------------------------------------------


def test_no_dim_is_named_outside_of_the_mesh_and_the_policy() -> None:
    named = set(get_args(Dim)) - {"near", "far"}  # those two are roles of the same name
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        # config/ spells JSON keys ("tensor_parallel.tp"); they name sections, not dims.
        if name.startswith(("mesh/", "config/")) or name == "zero/policy.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in named:
                found.append(f"{name}:{node.lineno} {node.value}")
    assert not found, "ask for a role, or pass a placement's dims on: " + ", ".join(found)


def test_the_box_is_in_the_contract_s_order() -> None:
    assert DIMS == ("pp", "dp_replicate", "dp_shard", "sp", "tp")

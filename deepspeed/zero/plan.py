"""Which buckets a model becomes: cut and laid out, as a list that others act on.

`zero.build` executes the plan with memory and communication, `memory` plays it with numbers, and `zero.join` plans a bucket
more. So there is one place that decides, and a prediction is about the buckets that will be.

    plan_model    1. parameters that are no numbers to train (integers) stay outside of buckets
                  2. where parameters are sharded, small ones stay whole (resident), the others go by unit (`zero.cut`)
                  3. the rest by size, in reverse order of registration, which is about the order of gradients
    plan_bucket   one bucket: order, layout over the ranks that share it, tiers (`zero.placing`)

Experts that other ranks do not hold have buckets of their own, over "expert_shard" instead of "shard".

Invariant: pure. It reads shapes, marks and the tree of modules; no rank, no value, no memory. Every rank plans the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from deepspeed.mesh import marks
from deepspeed.mesh.shape import Role
from deepspeed.zero.cut import Unit, cut_by_module, cut_by_size, users_of
from deepspeed.zero.layout import BucketLayout, group_neighbours
from deepspeed.zero.param import full_numel, full_shape
from deepspeed.zero.placing import Places, Placing

MAX_BUCKET_NUMEL = 8 * 2**20
"""Elements of a bucket that is cut by size, unless the configuration says less: enough buckets to overlap with
backward, few enough that their number does not show (32 MiB of fp32; DDP uses 25 MiB)."""

MIN_UNIT_NUMEL = 2**20
"""Smaller neighbouring modules share a unit at stage 3."""

Named = Sequence[tuple[nn.Parameter, str]]


@dataclass
class Limits:
    """Sizes in elements, from `zero_optimization`."""

    bucket_numel: int = MAX_BUCKET_NUMEL
    persist_numel: int = 100_000
    persist_total_numel: int = 2**63
    max_unit_numel: int = 250_000_000


@dataclass(frozen=True, kw_only=True)
class BucketPlan:
    """One bucket to be: `params[i]` is called `names[i]`, of full shape `shapes[i]`, and lies where `layout` says."""

    params: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    layout: BucketLayout
    places: Places
    is_sharded: bool
    trains: bool
    over: Role = "shard"
    """The ranks that share the bucket."""


@dataclass
class ModelPlan:
    """All buckets of a model, in the order in which they are made, and what lies outside of them."""

    buckets: list[BucketPlan] = field(default_factory=list)
    users: dict[nn.Module, list[int]] = field(default_factory=dict)
    """Sharded buckets that each module uses, as positions in `buckets`."""
    resident: list[nn.Parameter] = field(default_factory=list)
    """Parameters that stay whole although the policy shards them."""
    loose: list[tuple[nn.Parameter, str]] = field(default_factory=list)
    """Parameters without a bucket: cast, moved, and the same on every rank."""


def shared_over(param: nn.Parameter) -> Role:
    """The ranks that hold the same parameter: those with the same experts for an expert's."""
    return "expert_shard" if marks.of(param).is_expert else "shard"


def plan_model(
    module: nn.Module,
    group_of: Mapping[nn.Parameter, int],
    placing: Placing,
    limits: Limits,
    shard_size: int,
    expert_shard_size: int | None = None,
) -> ModelPlan:
    """Plan the buckets of `module` on each of `shard_size` ranks; those of experts on each of `expert_shard_size`.

    `group_of` gives each optimized parameter its group.
    """
    sizes: dict[Role, int] = {"shard": shard_size, "expert_shard": expert_shard_size or shard_size}
    plan = ModelPlan()
    named = {param: name for name, param in module.named_parameters()}
    plan.loose = [(p, name) for p, name in named.items() if not (p.is_floating_point() or p.is_complex())]
    for param, _ in plan.loose:
        del named[param]
    trained = {param for param in named if param.requires_grad and param in group_of}

    def add(params: Named, is_sharded: bool) -> int:
        plan.buckets.append(plan_bucket(params, group_of, placing, sizes, is_sharded=is_sharded))
        return len(plan.buckets) - 1

    def add_by_size(params: Mapping[nn.Parameter, str], trains: bool) -> None:
        for bucket in chunks_by_size([(p, n) for p, n in params.items() if (p in trained) is trains], limits):
            add(bucket, False)

    if not placing.policy.parameters.is_sharded:
        add_by_size(named, True)
        plan.loose += [(param, name) for param, name in named.items() if param not in trained]
        return plan
    resident, units = choose_units(module, named, limits)
    plan.resident = list(resident)
    add_by_size(resident, True)
    add_by_size(resident, False)
    of_unit: list[list[int]] = []
    for unit in units:
        params = [(param, name) for name, param in unit.params]
        kinds = ([p for p in params if p[0] in trained], [p for p in params if p[0] not in trained])
        of_unit.append([add(alike, True) for kind in kinds for alike in of_one_kind(kind)])
    plan.users = {user: [i for u in units_of for i in of_unit[u]] for user, units_of in users_of(module, units).items()}
    return plan


def plan_bucket(
    named: Named, group_of: Mapping[nn.Parameter, int], placing: Placing, sizes: Mapping[Role, int], *, is_sharded: bool
) -> BucketPlan:
    """Plan one bucket of parameters that all train, or all do not; those of one group become neighbours.

    `sizes` has the number of ranks that share a bucket, by who they are.
    """
    over = shared_over(named[0][0])
    assert all(shared_over(param) == over for param, _ in named), "a bucket's parameters are shared by the same ranks"
    trains = named[0][0].requires_grad and named[0][0] in group_of
    groups = [group_of[param] if trains else -1 for param, _ in named]
    order = group_neighbours(groups)
    shapes = tuple(full_shape(named[i][0]) for i in order)
    numels = tuple(full_numel(named[i][0]) for i in order)
    layout = BucketLayout(numels, tuple(groups[i] for i in order), sizes[over])
    return BucketPlan(
        params=tuple(named[i][0] for i in order),
        names=tuple(named[i][1] for i in order),
        shapes=shapes,
        layout=layout,
        places=placing.decide(layout.shard_numel, is_sharded=is_sharded, trains=trains),
        is_sharded=is_sharded,
        trains=trains,
        over=over,
    )


def choose_units(
    module: nn.Module, named: Mapping[nn.Parameter, str], limits: Limits
) -> tuple[dict[nn.Parameter, str], list[Unit]]:
    """Split parameters into those that stay whole on every rank and units of those that are sharded."""
    resident: dict[nn.Parameter, str] = {}
    total = 0
    for param, name in named.items():
        numel = full_numel(param)
        if numel <= limits.persist_numel and total + numel <= limits.persist_total_numel:
            resident[param] = name
            total += numel
    wanted = {param: name for param, name in named.items() if param not in resident}
    return resident, cut_by_module(module, wanted, min_numel=MIN_UNIT_NUMEL, max_numel=limits.max_unit_numel)


def chunks_by_size(named: Named, limits: Limits) -> list[list[tuple[nn.Parameter, str]]]:
    """Buckets in reverse order of registration, which is about the order in which gradients arrive."""
    made = []
    for backwards in of_one_kind(list(named)[::-1]):
        chunks = cut_by_size([full_numel(param) for param, _ in backwards], limits.bucket_numel)
        made += [[backwards[i] for i in chunk] for chunk in chunks]
    return made


def of_one_kind(named: Named) -> list[list[tuple[nn.Parameter, str]]]:
    """Real and complex parameters apart: a complex view must begin at an even element, which it does among its like. And
    experts' apart from what all ranks share."""
    kinds: dict[tuple[bool, bool], list[tuple[nn.Parameter, str]]] = {}
    for param, name in named:
        kinds.setdefault((marks.of(param).is_expert, param.is_complex()), []).append((param, name))
    return [kinds[key] for key in sorted(kinds)]

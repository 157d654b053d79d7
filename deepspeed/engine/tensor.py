"""Tensor parallelism: what the engine does about it before anything is built.

Called by `engine.build`. The sizes in the configuration and what `tp_model_init` was told become one size; the model is cut
(`parallel.tensor`), also one that `zero.Init` had sharded; an optimizer that came first goes on with the parts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed.assembly.tensor import layer_wishes
from deepspeed.config import Config
from deepspeed.engine import cut_experts
from deepspeed.memory.fit import check_fit
from deepspeed.mesh import Mesh
from deepspeed.mesh.shape import Role
from deepspeed.parallel.tensor import requested
from deepspeed.parallel.tensor.apply import PARSED, Drawn, carry_out, cut_states, draw
from deepspeed.parallel.tensor.choose import Chosen, Wishes, choose, require_found
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.inputs import check_first_forward
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError
from deepspeed.utils.logging import log_dist, warn_once
from deepspeed.zero.build import make_plain


def stated_mpu(config: Config, mpu: Any) -> Any:
    """The one mpu, of `deepspeed.initialize` or of the configuration. Raises DeepSpeedConfigError where both say another."""
    stated = config.tensor_parallel.tensor_parallel.mpu
    if stated is not None and mpu is not None and stated is not mpu:
        raise DeepSpeedConfigError(
            "tensor_parallel.tp.mpu and deepspeed.initialize(mpu=...) are two: both say which ranks share layers.\n  Give one."
        )
    return mpu if mpu is not None else stated


def tensor_size(config: Config, mpu: Any) -> int:
    """Over how many ranks layers are cut, by the configuration and `tp_model_init`, which is taken.

    Collective over the job where ranks are given as a group. Raises DeepSpeedConfigError (a ValueError) on every rank where
    they contradict each other.
    """
    told, section = requested.take(), config.tensor_parallel
    stated = section.dtype if "dtype" in section.model_fields_set else None
    if stated is not None and stated != config.precision_dtype:
        warn_once(
            f"tensor_parallel.dtype = {stated} has no effect: parts train in the model's {config.precision_dtype}."
        )
    size = _stated_size(config) if told is None else _told_size(config, told)
    for source, group in (
        ("tp_model_init provided tp_group", told.group if told is not None else None),
        ("tensor_parallel.tp provided tp_group", section.tensor_parallel.tp_group),
    ):
        if group is not None:
            size = _size_of(group, size, mpu, source)
    return size


def _stated_size(config: Config) -> int:
    size, inner = config.tensor_parallel.autotp_size, config.tensor_parallel.tensor_parallel.tp_size
    if inner > 1 and inner != size:
        raise DeepSpeedConfigError(
            f"tensor_parallel.autotp_size = {size}, tensor_parallel.tp.tp_size = {inner}: training cuts layers by the first.\n"
            "  Remove one of them."
            if size > 1
            else f"tensor_parallel.tp.tp_size = {inner} without tensor_parallel.autotp_size, by which training cuts layers.\n"
            f"  Set tensor_parallel.autotp_size to {inner}."
        )
    return max(size, 1)


def _told_size(config: Config, told: requested.Request) -> int:
    section = config.tensor_parallel
    size, inner, stated = section.autotp_size, section.tensor_parallel.tp_size, section.dtype
    if size not in (0, 1, told.size):
        raise DeepSpeedConfigError(
            f"Conflicting tensor_parallel.autotp_size = {size}: tp_model_init was given tp_size {told.size}.\n  Remove one."
        )
    if inner not in (1, told.size):
        raise DeepSpeedConfigError(
            f"Conflicting tensor_parallel.tp.tp_size = {inner}: tp_model_init was given tp_size {told.size}.\n  Remove one."
        )
    if "dtype" in section.model_fields_set and told.dtype not in (None, stated):
        raise DeepSpeedConfigError(
            f"Conflicting tensor_parallel.dtype = {stated}: tp_model_init was given {told.dtype}.\n  Remove one."
        )
    configured = config.precision_dtype
    if told.dtype is not None and configured is not torch.float32 and told.dtype != configured:
        raise DeepSpeedConfigError(
            f"Conflicting dtype: config uses {configured}, tp_model_init was given {told.dtype}.\n  Give both the same."
        )
    return told.size


def _size_of(group: Any, size: int, mpu: Any, source: str) -> int:
    """The size of a group that `source` gave; all ranks hear of what is wrong with one of theirs."""
    if mpu is not None:
        raise DeepSpeedConfigError(
            f"{source}, and deepspeed.initialize an mpu: both say which ranks share layers.\n  Give one."
        )
    ranks = dist.get_process_group_ranks(group)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ranks)
    for theirs in everyone:
        _check_group(theirs, size if size > 1 else len(ranks), source)
    return len(ranks)


def _check_group(ranks: list[int], size: int, source: str) -> None:
    if len(ranks) != size:
        raise DeepSpeedConfigError(
            f"{source} of ranks {ranks}, but layers are to be cut over {size} ranks.\n  Give both the same size."
        )
    if ranks[0] % size or ranks != list(range(ranks[0], ranks[0] + size)):
        raise DeepSpeedConfigError(
            f"{source} of ranks {ranks}: ranks that share layers are consecutive here, from a multiple of "
            f"{size}.\n  Make the groups of consecutive ranks, or leave tp_group out."
        )


def cut_model(model: nn.Module, mesh: Mesh, config: Config, size: int, optimizer: Any) -> Any:
    """Cut the model's layers over `size` ranks, and have the first forward compare data. Collective. Returns what undoes
    the latter, None for a model that stays whole."""
    if size == 1:
        return None
    if mesh.size("tensor") != size:
        raise DeepSpeedConfigError(
            f"tensor_parallel.autotp_size = {size}, but the mpu has {mesh.size('tensor')} tensor-parallel ranks.\n"
            "  Give both the same size (a PipelineModule by topology=PipeModelDataParallelTopology(num_pp, num_mp, num_dp)), or leave "
            "the mpu out."
        )
    if config.tensor_parallel.sequence_parallel_regions and mesh.size("sequence") > 1:
        raise DeepSpeedConfigError(
            f"tensor_parallel.sequence_parallel_regions = true beside sequence parallelism over {mesh.size('sequence')} ranks, which has "
            "parts of sequences everywhere.\n  Leave out one of them."
        )
    if PARSED not in model.__dict__:
        _cut(model, mesh, config, optimizer)
    requested.set_autotp_mode(training=True)
    roles: tuple[Role, ...] = ("tensor", "batch")
    for role in roles:
        mesh.group(role, "script")  # by all ranks, before one of them asks `deepspeed.utils.groups`
    return check_first_forward(model, lambda digest: mesh.gather_objects("tensor", digest))


def _cut(model: nn.Module, mesh: Mesh, config: Config, optimizer: Any) -> None:
    ranks = TensorGroup(mesh.group("tensor", "tensor"), mesh.rank("tensor"), mesh.size("tensor"))
    chosen, drawn = _drawn(model, mesh, ranks, layer_wishes(config, is_part=mesh.size("pipeline") > 1))
    carry_out(model, ranks, drawn, make_plain, fills=True)
    if isinstance(optimizer, torch.optim.Optimizer):
        cut_states(optimizer.state, ranks, drawn)
    log_dist(
        f"tensor parallelism over {ranks.size} ranks: {chosen.num_acted} layers by the model's {chosen.source}",
        ranks=[0],
    )


def _drawn(model: nn.Module, mesh: Mesh, ranks: TensorGroup, wishes: Wishes) -> tuple[Chosen, Drawn]:
    """What becomes of each layer. Stages tell each other, so that a refusal of one is all ranks' error."""
    mine: tuple[Chosen, Drawn] | None = None
    refusal: DeepSpeedError | None = None
    try:
        mine = draw(model, ranks, wishes, cut_experts.decide(model, choose(model, wishes)))
    except DeepSpeedError as error:
        refusal = error
    told = mesh.gather_objects("pipeline", mine[0] if mine is not None else str(refusal))
    if refusal is not None:
        raise refusal
    elsewhere = next((words for words in told if isinstance(words, str)), None)
    if elsewhere is not None:
        raise DeepSpeedConfigError(f"on another stage of the pipeline: {elsewhere}")
    require_found(model, told)
    assert mine is not None, "there is a refusal, or there are decisions"
    check_fit(model, ranks.size, wishes, mine[0])
    return mine

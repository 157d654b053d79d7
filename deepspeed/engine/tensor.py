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


def tensor_size(config: Config, mpu: Any) -> int:
    """Over how many ranks layers are cut, by the configuration and `tp_model_init`, which is taken.

    Raises DeepSpeedConfigError (a ValueError) where they contradict each other.
    """
    told, section = requested.take(), config.tensor_parallel
    stated = section.dtype if "dtype" in section.model_fields_set else None
    if stated is not None and stated != config.precision_dtype:
        warn_once(
            f"tensor_parallel.dtype = {stated} has no effect: parts train in the model's {config.precision_dtype}."
        )
    size, inner = section.autotp_size, section.tensor_parallel.tp_size
    if told is None:
        if size > 1 and inner not in (1, size):
            raise DeepSpeedConfigError(
                f"tensor_parallel.autotp_size = {size}, tensor_parallel.tp.tp_size = {inner}.\n  Remove one of them."
            )
        return max(size, 1)
    if size not in (0, 1, told.size):
        raise DeepSpeedConfigError(
            f"Conflicting tensor_parallel.autotp_size = {size}: tp_model_init was given tp_size {told.size}.\n  Remove one."
        )
    if inner not in (1, told.size):
        raise DeepSpeedConfigError(
            f"Conflicting tensor_parallel.tp.tp_size = {inner}: tp_model_init was given tp_size {told.size}.\n  Remove one."
        )
    if stated is not None and told.dtype not in (None, stated):
        raise DeepSpeedConfigError(
            f"Conflicting tensor_parallel.dtype = {stated}: tp_model_init was given {told.dtype}.\n  Remove one."
        )
    configured = config.precision_dtype
    if told.dtype is not None and configured is not torch.float32 and told.dtype != configured:
        raise DeepSpeedConfigError(
            f"Conflicting dtype: config uses {configured}, tp_model_init was given {told.dtype}.\n  Give both the same."
        )
    if told.group is not None and mpu is not None:
        raise DeepSpeedConfigError(
            "tp_model_init provided tp_group, and deepspeed.initialize an mpu: both say which ranks share layers.\n  Give one."
        )
    if told.group is not None:
        _check_consecutive(dist.get_process_group_ranks(told.group), told.size)
    return told.size


def _check_consecutive(ranks: list[int], size: int) -> None:
    if ranks[0] % size or ranks != list(range(ranks[0], ranks[0] + size)):
        raise DeepSpeedConfigError(
            f"tp_model_init provided tp_group of ranks {ranks}: ranks that share layers are consecutive here, from a multiple of "
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
    carry_out(model, ranks, drawn, make_plain)
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
    return mine

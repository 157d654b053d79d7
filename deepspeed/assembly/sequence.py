"""From the configuration to sequence parallelism: how many ranks share a sequence, and what their losses are.

Called by the engine's builder. The size comes from `sequence_parallel_size`, from `mesh_param=(data, sequence)` or from an mpu;
where several of them speak they have to agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deepspeed.config import Config
from deepspeed.mesh import Mesh
from deepspeed.mesh.groups import _get_sequence_parallel_group
from deepspeed.parallel.sequence.forward import forward_of
from deepspeed.parallel.sequence.hf import prepare_forward, split_model
from deepspeed.parallel.sequence.loss import SequenceLoss
from deepspeed.utils.errors import DeepSpeedConfigError


def sequence_size(config: Config, mesh_param: Any, num_ranks: int, *, has_mpu: bool) -> int:
    """Ranks that share a sequence, by the configuration and `mesh_param`; 1 without, or where an mpu tells.

    Raises DeepSpeedConfigError where they contradict, or do not make up the ranks.
    """
    size, data = config.sequence_parallel_size or 1, config.data_parallel_size
    if mesh_param is not None:
        if len(tuple(mesh_param)) != 2 or not all(isinstance(n, int) and n > 0 for n in mesh_param):
            raise DeepSpeedConfigError(
                f"mesh_param = {mesh_param}: it is (data parallel size, sequence parallel size)."
            )
        if size not in (1, mesh_param[1]):
            raise DeepSpeedConfigError(
                f"mesh_param = {tuple(mesh_param)}, but sequence_parallel_size = {size}.\n  Give one of them."
            )
        data, size = mesh_param
    if has_mpu or (size == 1 and mesh_param is None):  # data_parallel_size alone says nothing
        return 1
    if num_ranks % size or data not in (None, num_ranks // size):
        told = f"mesh_param = {tuple(mesh_param)}" if mesh_param is not None else f"sequence_parallel_size = {size}"
        told += f" and data_parallel_size = {data}" if data is not None and mesh_param is None else ""
        raise DeepSpeedConfigError(
            f"{told}: these do not make up the {num_ranks} ranks of the job.\n  Choose a sequence parallel size that divides "
            f"{num_ranks}, and the quotient as data parallel size."
        )
    return size


def check_sequence_size(config: Config, mesh: Mesh) -> None:
    """Refuse a `sequence_parallel_size` that an mpu contradicts."""
    size = config.sequence_parallel_size or 1
    if size not in (1, mesh.size("sequence")):
        raise DeepSpeedConfigError(
            f"sequence_parallel_size = {size}, but by the mpu {mesh.size('sequence')} ranks share a sequence.\n"
            "  Give one of them, or both alike."
        )


def make_sequence_loss(config: Config, mesh: Mesh, model: nn.Module) -> SequenceLoss | None:
    """What weighs losses where ranks share sequences; prepares the forward of a model that was registered for it."""
    if mesh.size("sequence") == 1:
        return None
    if mesh.size("sequence") < torch.distributed.get_world_size():
        mesh.group("sequence", "script")  # by all ranks, before one of them asks for it
    prepare_forward(model)
    if config.compile.splits_sequences:
        split_model(model, _get_sequence_parallel_group())
    return SequenceLoss(_get_sequence_parallel_group(), config.sequence_parallel_loss, forward_of(model))

"""The process groups as scripts ask for them (`deepspeed.utils.groups`): of the last mesh that an engine made.

Names with a leading underscore are the used contract. With data parallelism alone, model and sequence groups are this
rank's own.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deepspeed.mesh.mesh import current_mesh
from deepspeed.utils.errors import DeepSpeedError


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Removed long ago: pass ep_size to each MoE layer."""
    raise DeepSpeedError("deepspeed.utils.groups.initialize() is gone.\n  Pass ep_size to deepspeed.moe.layer.MoE.")


def get_data_parallel_group() -> Any:
    """The group of all data-parallel ranks."""
    return dist.group.WORLD


def get_data_parallel_rank() -> int:
    """This rank's position among the data-parallel ranks."""
    return current_mesh().rank("batch")


def get_data_parallel_world_size() -> int:
    """Number of data-parallel ranks."""
    return current_mesh().size("batch")


def get_model_parallel_rank() -> int:
    """Position among model-parallel ranks."""
    return 0


def get_model_parallel_world_size() -> int:
    """Number of model-parallel ranks."""
    return 1


_get_data_parallel_group = _get_sequence_data_parallel_group = get_data_parallel_group
_get_data_parallel_rank = _get_sequence_data_parallel_rank = get_data_parallel_rank
_get_data_parallel_world_size = _get_sequence_data_parallel_world_size = get_data_parallel_world_size
_get_sequence_parallel_rank = get_tensor_model_parallel_rank = get_model_parallel_rank
_get_sequence_parallel_world_size = get_tensor_model_parallel_world_size = get_model_parallel_world_size


def _get_sequence_parallel_group() -> Any:
    """The group of ranks that share a sequence: none is made without sequence parallelism."""
    return None

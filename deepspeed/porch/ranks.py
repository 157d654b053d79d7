"""Positions of this rank as functions of `deepspeed.runtime.pipe.topology`, which scripts of older versions import.

Invariant: they answer what `deepspeed.utils.groups` and the mesh in use answer; nothing is kept here.
"""

from __future__ import annotations

from deepspeed.mesh.groups import get_data_parallel_rank as get_data_parallel_rank
from deepspeed.mesh.groups import get_data_parallel_world_size as get_data_parallel_world_size
from deepspeed.mesh.groups import get_tensor_model_parallel_rank as get_slice_parallel_rank
from deepspeed.mesh.mesh import current_mesh

__all__ = [
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_pipe_parallel_rank",
    "get_pipe_parallel_world_size",
    "get_slice_parallel_rank",
]


def get_pipe_parallel_rank() -> int:
    """This rank's pipeline stage; 0 without a pipeline."""
    return current_mesh().rank("pipeline")


def get_pipe_parallel_world_size() -> int:
    """Number of pipeline stages; 1 without a pipeline."""
    return current_mesh().size("pipeline")

"""Who shares a sequence, as a module that is an `mpu`: `deepspeed.runtime.sequence_parallel.parallel_state_sp`.

`initialize_sequence_parallel(n)` makes the groups, once per job: n consecutive ranks share a sequence, those at the same place
of different sequences share a batch. `deepspeed.initialize(mpu=...)` takes the module itself. The getters of a "model parallel"
group mean the sequence, as in the public contract; there is no model parallelism in it.

Invariant: groups belong to the default process group and are forgotten with it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deepspeed.mesh.groups import _made
from deepspeed.mesh.mesh import forget_given, world_size
from deepspeed.mesh.script import Made
from deepspeed.mesh.shape import MeshShape
from deepspeed.utils.errors import DeepSpeedError

_SEQUENCE, _DATA, _BOTH = (
    "sequence_parallel.script",
    "sequence_parallel_batch.script",
    "sequence_parallel_average.script",
)


class SequenceGroupsError(DeepSpeedError, RuntimeError):
    """Sequence-parallel groups that do not fit the job."""


def initialize_sequence_parallel(sequence_parallel_size: int) -> None:
    """Make the groups of `sequence_parallel_size` consecutive ranks. Collective; once per job.

    Raises ValueError for a size below 2, RuntimeError for one that does not divide the ranks, AssertionError a second time.
    """
    if sequence_parallel_size <= 1:
        raise DeepSpeedError(
            f"initialize_sequence_parallel({sequence_parallel_size}): a sequence is shared by at least 2 ranks.\n"
            "  Without sequence parallelism do not call it."
        )
    world = world_size()
    if sequence_parallel_size > world or world % sequence_parallel_size:
        raise SequenceGroupsError(
            f"sequence parallel size {sequence_parallel_size} does not divide the {world} ranks of the job.\n"
            f"  Choose a divisor of {world}, or start more ranks."
        )
    if _made.find(_SEQUENCE) is not None:
        raise DeepSpeedError(
            f"sequence parallel groups of {get_sequence_parallel_world_size()} ranks were made before in this job.\n"
            "  Call initialize_sequence_parallel (or register_with_transformers) once."
        )
    shape = MeshShape(dp_shard=world // sequence_parallel_size, sp=sequence_parallel_size)
    _made.make(_SEQUENCE, shape.groups("sequence"))
    _made.make(_DATA, shape.groups("batch"))
    _made.make(_BOTH, shape.groups("average"))


def destroy_sequence_parallel() -> None:
    """Take the groups down, so that others can be made. Every rank calls it, after its engines are gone."""
    for name in (_SEQUENCE, _DATA, _BOTH):
        found = _made.find(name)
        if found is not None and found.group is not dist.GroupMember.NON_GROUP_MEMBER:
            forget_given(found.group)
            dist.destroy_process_group(found.group)
        _made.forget(name)


def is_initialized() -> bool:
    """Whether the groups were made."""
    return _made.find(_SEQUENCE) is not None


def _get(name: str) -> Made:
    found = _made.find(name)
    if found is None:
        raise DeepSpeedError(
            "there are no sequence parallel groups in this job.\n  Call initialize_sequence_parallel(size) on every rank first."
        )
    return found


def get_sequence_parallel_group() -> Any:
    """The group of the ranks that share a sequence with this one."""
    return _get(_SEQUENCE).group


def get_sequence_parallel_world_size() -> int:
    """How many they are."""
    return len(_get(_SEQUENCE).own)


def get_sequence_parallel_rank() -> int:
    """This rank's position among them: which part of the sequence it has."""
    return _get(_SEQUENCE).own.index(dist.get_rank())


def get_sequence_parallel_src_rank() -> int:
    """The global rank of the first of them."""
    return _get(_SEQUENCE).own[0]


def get_data_parallel_group() -> Any:
    """The group of the ranks with the same part of other sequences: they share a batch."""
    return _get(_DATA).group


def get_data_parallel_world_size() -> int:
    """How many they are."""
    return len(_get(_DATA).own)


def get_data_parallel_rank() -> int:
    """This rank's position among them."""
    return _get(_DATA).own.index(dist.get_rank())


def get_sequence_data_parallel_group() -> Any:
    """The group of all ranks that average their gradients."""
    return _get(_BOTH).group


def get_sequence_data_parallel_world_size() -> int:
    """How many they are."""
    return len(_get(_BOTH).own)


def get_sequence_data_parallel_rank() -> int:
    """This rank's position among them."""
    return _get(_BOTH).own.index(dist.get_rank())


get_model_parallel_group = get_sequence_parallel_group
get_model_parallel_world_size = get_sequence_parallel_world_size
get_model_parallel_rank = get_sequence_parallel_rank
get_model_parallel_src_rank = get_sequence_parallel_src_rank

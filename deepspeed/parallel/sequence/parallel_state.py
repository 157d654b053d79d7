"""Who shares a sequence, as a module that is an `mpu`: `deepspeed.runtime.sequence_parallel.parallel_state_sp`.

`initialize_sequence_parallel(n)` makes the groups, once per job: n consecutive ranks share a sequence, those at the same place
of different sequences share a batch. `deepspeed.initialize(mpu=...)` takes the module itself. The getters of a "model parallel"
group mean the sequence, as in the public contract. Where the engine's configuration cuts layers too (`autotp_size`), the groups
are made anew with the ranks that share layers innermost (`divide_layers`): t consecutive ranks share layers, and every t-th one
a sequence.

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

_SEQUENCE, _DATA, _BOTH, _TENSOR = (
    "sequence_parallel.script",
    "sequence_parallel_batch.script",
    "sequence_parallel_average.script",
    "sequence_parallel_tensor.script",
)
_BEFORE = "before."
"""In front of the names of groups that `divide_layers` replaced."""


_NAMES = (_SEQUENCE, _DATA, _BOTH, _TENSOR)


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
    _make(MeshShape(dp_shard=world // sequence_parallel_size, sp=sequence_parallel_size))


def divide_layers(tp: int) -> None:
    """Make the groups anew, for a job in which `tp` consecutive ranks share layers. Collective; nothing where they are so.

    What a script took from the getters before is of the old groups: `current_place` knows. Raises SequenceGroupsError.
    """
    sp, world = get_sequence_parallel_world_size(), world_size()
    if get_slice_parallel_world_size() == tp:
        return
    if world % (sp * tp):
        raise SequenceGroupsError(
            f"sequence parallel size {sp} times tensor_parallel.autotp_size = {tp} does not divide the {world} ranks of the job.\n"
            f"  Choose sizes whose product divides {world}, or start more ranks."
        )
    for name in _NAMES:
        found = _made.find(name)
        if found is not None:
            forget_given(found.group)
            _made.rename(name, _BEFORE + name)
    _make(MeshShape(dp_shard=world // sp // tp, sp=sp, tp=tp))


def _make(shape: MeshShape) -> None:
    _made.make(_SEQUENCE, shape.groups("sequence"))
    _made.make(_DATA, shape.groups("batch"))
    _made.make(_BOTH, shape.groups("average"))
    if shape.tp > 1:
        _made.make(_TENSOR, shape.groups("tensor"))


def current_place(group: Any, rank: int) -> tuple[Any, int]:
    """The group and the rank in it that stand for a group of a sequence and a rank in it, which a script may have asked for
    before the groups were made anew."""
    before = _made.find(_BEFORE + _SEQUENCE)
    if before is None or before.group is not group:
        return group, rank
    return get_sequence_parallel_group(), get_sequence_parallel_rank()


def destroy_sequence_parallel() -> None:
    """Take the groups down, so that others can be made. Every rank calls it, after its engines are gone."""
    for name in (*_NAMES, *(_BEFORE + name for name in _NAMES)):
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


def get_slice_parallel_group() -> Any:
    """The group of the ranks that share layers with this one; None where layers are whole."""
    found = _made.find(_TENSOR)
    return found.group if found is not None else None


def get_slice_parallel_world_size() -> int:
    """How many they are."""
    found = _made.find(_TENSOR)
    return len(found.own) if found is not None else 1


def get_slice_parallel_rank() -> int:
    """This rank's position among them."""
    found = _made.find(_TENSOR)
    return found.own.index(dist.get_rank()) if found is not None else 0


get_model_parallel_group = get_sequence_parallel_group
get_model_parallel_world_size = get_sequence_parallel_world_size
get_model_parallel_rank = get_sequence_parallel_rank
get_model_parallel_src_rank = get_sequence_parallel_src_rank

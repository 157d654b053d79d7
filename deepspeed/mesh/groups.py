"""The process groups as scripts ask for them: `deepspeed.utils.groups`.

Names and what they return are the public contract of the original; names with a leading underscore are the used ones.
Answers come, in this order, from an `mpu` the script set, from groups the script created here, and from the mesh of the
engine that was made last (without one: data parallelism over all ranks). After tensor parallelism was set up this module
is itself an mpu.

Asking makes no group and is not collective, but for a data-parallel group of a mesh whose mpu had ranks and no groups.
Creating is collective over all ranks. A group nobody created is a KeyError that says which call would.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deepspeed.accelerator import get_accelerator
from deepspeed.mesh.mesh import current_mesh, world_size
from deepspeed.mesh.script import Made, ScriptGroups
from deepspeed.mesh.shape import MeshShape, Over
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError

# The contract has these two as attributes of the module, which scripts read and set.
mpu: Any = None
"""What `_create_expert_data_and_model_parallel` was given."""
mesh_device: Any = None
"""A torch DeviceMesh with dims "data_parallel" and "sequence_parallel", where sequence parallelism was asked for by size."""

_made = ScriptGroups()
_set: dict[str, int] = {}
"""What `set_tensor_model_parallel_*` said."""

_TENSOR, _DATA, _INTRA = "tensor_model_parallel", "data_parallel", "zero_param_intra_parallel"
_EXPERT, _EXPERT_DATA = "expert_parallel.", "expert_data_parallel."


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Removed long ago: pass ep_size to each MoE layer."""
    raise DeepSpeedError("deepspeed.utils.groups.initialize() is gone.\n  Pass ep_size to deepspeed.moe.layer.MoE.")


def _of_mpu(*names: str) -> Any:
    """What the script's mpu answers to the first of these getters that it has; None without."""
    getters = (getattr(mpu, name, None) for name in names) if mpu is not None else ()
    getter = next((getter for getter in getters if callable(getter)), None)
    return getter() if getter is not None else None


def _mesh_group(over: Over) -> Any:
    mesh = current_mesh()
    if mesh.size(over) == world_size():
        return dist.group.WORLD
    return mesh.given.get(mesh.shape.dims(over)) or mesh.group(over, "script")


def _rank_of(made: Made) -> int:
    return made.own.index(dist.get_rank())


def _required(name: str, cure: str) -> Made:
    found = _made.find(name)
    if found is None:
        raise KeyError(f"there are no groups {name!r} in this process (it has {_made.names() or 'none'}): {cure}.")
    return found


# Data. ---------------------------------------------------------------------------------------------------------------


def get_data_parallel_group() -> Any:
    """The group of the ranks that share a batch."""
    made = _made.find(_DATA)
    given = _of_mpu("get_data_parallel_group")
    return given if given is not None else made.group if made else _mesh_group("batch")


def get_data_parallel_rank() -> int:
    """This rank's position among the ranks that share a batch."""
    made = _made.find(_DATA)
    given = _of_mpu("get_data_parallel_rank")
    return given if given is not None else _rank_of(made) if made else current_mesh().rank("batch")


def get_data_parallel_world_size() -> int:
    """Number of ranks that share a batch."""
    made = _made.find(_DATA)
    given = _of_mpu("get_data_parallel_world_size")
    return given if given is not None else len(made.own) if made else current_mesh().size("batch")


_get_data_parallel_group = get_data_parallel_group
_get_data_parallel_rank = get_data_parallel_rank
_get_data_parallel_world_size = get_data_parallel_world_size


def _get_sequence_data_parallel_group() -> Any:
    """The group of the ranks that average gradients: they differ in data, or in their part of a sequence."""
    given = _of_mpu("get_sequence_data_parallel_group")
    if given is not None:
        return given
    return _mesh_group("average") if current_mesh().size("sequence") > 1 else get_data_parallel_group()


def _get_sequence_data_parallel_rank() -> int:
    given = _of_mpu("get_sequence_data_parallel_rank")
    if given is not None:
        return int(given)
    return current_mesh().rank("average") if current_mesh().size("sequence") > 1 else get_data_parallel_rank()


def _get_sequence_data_parallel_world_size() -> int:
    given = _of_mpu("get_sequence_data_parallel_world_size")
    if given is not None:
        return int(given)
    return current_mesh().size("average") if current_mesh().size("sequence") > 1 else get_data_parallel_world_size()


def _get_broadcast_src_rank() -> int:
    """The global rank whose initial weights the others of its data-parallel group take."""
    return int(dist.get_global_rank(_get_sequence_data_parallel_group(), 0))


# Sequence. -----------------------------------------------------------------------------------------------------------

_SEQUENCE_DIM = "sequence_parallel"
_SEQUENCE = "sequence_parallel.script"
"""What `deepspeed.parallel.sequence.parallel_state` makes."""


def _get_sequence_parallel_world_size() -> int:
    """Number of ranks that share a sequence; 1 without sequence parallelism."""
    given = _of_mpu("get_sequence_parallel_world_size")
    if given is not None:
        return int(given)
    made = _made.find(_SEQUENCE)
    if made is not None:
        return len(made.own)
    return int(mesh_device[_SEQUENCE_DIM].size()) if mesh_device is not None else current_mesh().size("sequence")


def _get_sequence_parallel_rank() -> int:
    """This rank's position among those that share a sequence."""
    given = _of_mpu("get_sequence_parallel_rank")
    if given is not None:
        return int(given)
    made = _made.find(_SEQUENCE)
    if made is not None:
        return _rank_of(made)
    return (
        int(mesh_device[_SEQUENCE_DIM].get_local_rank()) if mesh_device is not None else current_mesh().rank("sequence")
    )


def _get_sequence_parallel_group() -> Any:
    """The group of the ranks that share a sequence. KeyError where there is no sequence parallelism."""
    given = _of_mpu("get_sequence_parallel_group")
    if given is not None:
        return given
    made = _made.find(_SEQUENCE)
    if made is not None:
        return made.group
    if mesh_device is not None:
        return mesh_device.get_group(_SEQUENCE_DIM)
    if current_mesh().size("sequence") == 1:
        raise KeyError(
            "there is no sequence-parallel group: neither an mpu nor a mesh with sequence parallelism was given."
        )
    return _mesh_group("sequence")


# Tensor, which the contract also calls model. ------------------------------------------------------------------------

_MODEL_GETTERS = ("get_tensor_model_parallel_{}", "get_model_parallel_{}")


def _init_tp_mesh_device(tensor_model_parallel_size: int = 1, data_parallel_size: int | None = None) -> None:
    """Make the tensor-parallel groups, consecutive ranks, and the data-parallel ones across them; once. Collective.

    Raises DeepSpeedConfigError on every rank if the sizes do not make up the ranks, or differ from those of before.
    """
    world, tp = world_size(), tensor_model_parallel_size
    dp = data_parallel_size or world // max(tp, 1)
    if tp < 1 or tp * dp != world:
        raise DeepSpeedConfigError(
            f"tensor parallel size {tp} x data parallel size {dp} do not make up the {world} ranks of the job.\n"
            f"  Choose a tensor parallel size that divides {world}."
        )
    shape = MeshShape(dp_shard=dp, tp=tp)
    _made.make(_DATA, shape.groups("batch"))
    _made.make(_TENSOR, shape.groups("tensor"))


def _create_model_parallel(model_parallel_size_: int) -> tuple[Any, Any]:
    """Make model-parallel groups of consecutive ranks: (data-parallel group, model-parallel group). Collective."""
    _init_tp_mesh_device(model_parallel_size_)
    return get_data_parallel_group(), get_tensor_model_parallel_group()


def get_tensor_model_parallel_group() -> Any:
    """The group of the ranks that hold pieces of one layer. KeyError where nothing made one."""
    given = _of_mpu(*(name.format("group") for name in _MODEL_GETTERS))
    if given is not None:
        return given
    if _made.find(_TENSOR) is None and current_mesh().size("tensor") > 1:
        return _mesh_group("tensor")
    return _required(_TENSOR, "call deepspeed.tp_model_init, or set tensor_parallel.autotp_size").group


def get_tensor_model_parallel_rank() -> int:
    """This rank's position among them; 0 without tensor parallelism."""
    given = _of_mpu(*(name.format("rank") for name in _MODEL_GETTERS))
    made = _made.find(_TENSOR)
    return _set.get("rank", given if given is not None else _rank_of(made) if made else current_mesh().rank("tensor"))


def get_tensor_model_parallel_world_size() -> int:
    """How many they are; 1 without tensor parallelism."""
    given = _of_mpu(*(name.format("world_size") for name in _MODEL_GETTERS))
    made = _made.find(_TENSOR)
    own = given if given is not None else len(made.own) if made else current_mesh().size("tensor")
    return _set.get("world_size", own)


def get_tensor_model_parallel_src_rank() -> int:
    """The global rank of the first of them."""
    made = _made.find(_TENSOR)
    return made.own[0] if made else current_mesh().ranks("tensor")[0]


def set_tensor_model_parallel_world_size(world_size: int | None) -> None:
    """Have the getter answer this, before any group is made; None takes it back."""
    _set.pop("world_size", None)
    _set.update({} if world_size is None else {"world_size": world_size})


def set_tensor_model_parallel_rank(rank: int | None) -> None:
    """Have the getter answer this, before any group is made; None takes it back."""
    _set.pop("rank", None)
    _set.update({} if rank is None else {"rank": rank})


get_model_parallel_group = get_tensor_model_parallel_group
get_model_parallel_rank = get_tensor_model_parallel_rank
get_model_parallel_world_size = _get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_model_parallel_src_rank = get_tensor_model_parallel_src_rank


# Experts. ------------------------------------------------------------------------------------------------------------


def _get_expert_parallel_ranks(
    world_size: int,
    tensor_parallel_size_: int,
    expert_parallel_size_: int,
    pipeline_parallel_size_: int = 1,
    use_data_before_expert_parallel_: bool = False,
) -> tuple[list[list[int]], list[list[int]]]:
    """(expert-parallel groups, expert-data-parallel groups) of a job, by global ranks, tp rank after tp rank. Pure."""
    shape = _expert_shape(
        world_size,
        expert_parallel_size_,
        tp=tensor_parallel_size_,
        pp=pipeline_parallel_size_,
        data_first=use_data_before_expert_parallel_,
    )
    lanes: list[list[list[int]]] = []
    for role in ("experts", "expert_shard"):
        groups = [list(ranks) for ranks in shape.groups(role)]
        stage = world_size // pipeline_parallel_size_
        lanes.append(sorted(groups, key=lambda ranks: (ranks[0] // stage, ranks[0] % tensor_parallel_size_, ranks[0])))
    return lanes[0], lanes[1]


def _expert_shape(
    world: int, ep: int, *, tp: int = 1, pp: int = 1, data_first: bool = False, folds_tp: bool = False
) -> MeshShape:
    if ep < 1 or tp < 1 or pp < 1 or world % (tp * pp):
        raise DeepSpeedConfigError(
            f"tensor parallel size {tp} x pipeline parallel size {pp} x expert parallel size {ep} do not fit the {world} ranks."
        )
    return MeshShape(pp=pp, dp_shard=world // (tp * pp), tp=tp, ep=ep, data_first=data_first, folds_tp=folds_tp)


def _make_experts(ep: int, shape: MeshShape) -> None:
    _made.make(f"{_EXPERT}ep_size_{ep}", shape.groups("experts"))
    _made.make(f"{_EXPERT_DATA}ep_size_{ep}", shape.groups("expert_shard"))


def _create_expert_and_data_parallel(
    expert_parallel_size_: int,
    mp_size: int | None = None,
    pp_size: int | None = None,
    mp_mode: str = "tp",
    use_data_before_expert_parallel_: bool = False,
) -> None:
    """Make groups `ep_size_N` over the ranks of each pipeline stage, whatever their tp rank. Collective; idempotent."""
    shape = _expert_shape(
        world_size(),
        expert_parallel_size_,
        tp=(mp_size or 1) if mp_mode == "tp" else 1,
        pp=pp_size or 1,
        data_first=use_data_before_expert_parallel_,
        folds_tp=True,
    )
    _make_experts(expert_parallel_size_, shape)


def _create_expert_data_and_model_parallel(
    expert_parallel_size_: int, mpu: Any, use_data_before_expert_parallel_: bool = False
) -> None:
    """Make groups `ep_size_N` for each model-parallel rank of an `mpu` (None: no model parallelism). Collective."""
    size_of = getattr(mpu, "get_tensor_model_parallel_world_size", None) or getattr(
        mpu, "get_model_parallel_world_size", None
    )
    tp = int(size_of()) if callable(size_of) else 1
    shape = _expert_shape(world_size(), expert_parallel_size_, tp=tp, data_first=use_data_before_expert_parallel_)
    globals()["mpu"] = mpu
    _make_experts(expert_parallel_size_, shape)


_CREATE = "create them with an MoE layer of that ep_size"


def _get_expert_parallel_group(group_name: str) -> Any:
    """The group of the ranks that hold different experts; `group_name` is "ep_size_N"."""
    return _required(_EXPERT + group_name, _CREATE).group


def _get_expert_parallel_rank(group_name: str) -> int:
    return _rank_of(_required(_EXPERT + group_name, _CREATE))


def _get_expert_parallel_world_size(group_name: str) -> int:
    return len(_required(_EXPERT + group_name, _CREATE).own)


def _get_expert_parallel_src_rank(group_name: str) -> int:
    return _required(_EXPERT + group_name, _CREATE).own[0]


def _get_expert_parallel_group_dict() -> dict[str, Any]:
    """All of them by name."""
    return _by_name(_EXPERT)


def _get_expert_data_parallel_group(group_name: str) -> Any:
    """The group of the ranks that hold the same experts."""
    return _required(_EXPERT_DATA + group_name, _CREATE).group


def _get_expert_data_parallel_rank(group_name: str) -> int:
    return _rank_of(_required(_EXPERT_DATA + group_name, _CREATE))


def _get_expert_data_parallel_world_size(group_name: str) -> int:
    return len(_required(_EXPERT_DATA + group_name, _CREATE).own)


def _get_expert_data_parallel_group_dict() -> dict[str, Any]:
    """All of them by name."""
    return _by_name(_EXPERT_DATA)


def _get_expert_broadcast_src_rank(group_name: str) -> int:
    """The global rank whose initial experts the others that hold the same ones take."""
    return _required(_EXPERT_DATA + group_name, _CREATE).own[0]


def _by_name(prefix: str) -> dict[str, Any]:
    found = {name.removeprefix(prefix): _made.find(name) for name in _made.names() if name.startswith(prefix)}
    return {name: made.group for name, made in found.items() if made}


def _get_max_expert_size() -> int:
    """The largest N of all groups "ep_size_N". KeyError where there are none."""
    sizes = [int(name.removeprefix("ep_size_")) for name in _by_name(_EXPERT)]
    if not sizes:
        raise KeyError(f"there are no expert-parallel groups in this process: {_CREATE}.")
    return max(sizes)


def _get_max_expert_size_name() -> str:
    """Its name."""
    return f"ep_size_{_get_max_expert_size()}"


def _get_max_expert_parallel_group() -> Any:
    """Its group."""
    return _get_expert_parallel_group(_get_max_expert_size_name())


def _get_local_all_to_all_group() -> dict[str, Any]:
    """Groups for an all-to-all in two steps: `local_i` of the ranks on node i, `global_j` of the j-th rank of each node.

    This rank's two, under their names; made at the first call, which is collective.
    """
    world = world_size()
    per_node = min(max(1, get_accelerator().device_count()), world)
    if world % per_node:
        per_node = world
    rank = dist.get_rank()
    local = _made.make("all_to_all.local", [range(i, i + per_node) for i in range(0, world, per_node)])
    across = _made.make("all_to_all.global", [range(j, world, per_node) for j in range(per_node)])
    return {f"local_{rank // per_node}": local.group, f"global_{rank % per_node}": across.group}


# ZeRO's second copy of parameters (hpZ). -----------------------------------------------------------------------------


def _create_zero_param_parallel_group(group_size: int) -> None:
    """Make the groups of `group_size` consecutive ranks that keep a second copy of parameters. Collective."""
    world = world_size()
    if group_size < 1 or world % group_size:
        raise DeepSpeedConfigError(f"zero_hpz_partition_size = {group_size} does not divide the {world} ranks.")
    _made.make(_INTRA, MeshShape(dp_shard=world, near=group_size).groups("near"))


def _get_zero_param_intra_parallel_group() -> Any:
    """Their group; None where nobody made one."""
    made = _made.find(_INTRA)
    return made.group if made else None


def _zero_param_parallel_is_initialized() -> bool:
    """Whether they were made."""
    return _made.find(_INTRA) is not None


def _get_zero_param_intra_parallel_rank_in_mygroup() -> int:
    """This rank's position in it."""
    return _rank_of(_required(_INTRA, "set zero_optimization.zero_hpz_partition_size"))


def _get_zero_param_intra_parallel_group_world_size() -> int:
    """How many ranks it has."""
    return len(_required(_INTRA, "set zero_optimization.zero_hpz_partition_size").own)


def _get_zero_param_intra_parallel_group_ranks() -> list[int]:
    """Their global ranks."""
    return list(_required(_INTRA, "set zero_optimization.zero_hpz_partition_size").own)


def __getattr__(name: str) -> Any:
    if name == "_ZERO_PARAM_INTRA_PARALLEL_GROUP":
        return _get_zero_param_intra_parallel_group()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

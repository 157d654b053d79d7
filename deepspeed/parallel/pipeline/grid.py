"""A topology's process groups, as an `mpu`: `deepspeed.runtime.pipe.topology.PipelineParallelGrid`.

Made by scripts and by pipeline modules; the engine reads it at its door like any mpu (`mesh.door`). "Model" in its
getters is pipe x model, as the contract has it; "slice" is the model axis alone. An axis "sequence" is ours: its ranks have
parts of the same sequences.

Invariant: making one is collective over its ranks' job, and every getter afterwards is not.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist

from deepspeed.mesh.script import Made, ScriptGroups
from deepspeed.parallel.pipeline.topology import PipeDataParallelTopology, ProcessTopology, _prime_factors
from deepspeed.utils.errors import DeepSpeedConfigError

PIPE, DATA, MODEL, SEQUENCE = "pipe", "data", "model", "sequence"

GROUPS = ScriptGroups()
"""Of all grids and ties of this process: making groups is collective and none is ever closed, so equal ones are shared."""


class PipelineParallelGrid:
    """The groups of every axis. Without a topology, the prime factors of the ranks go to pipe and data in turn.

    Collective. Raises DeepSpeedConfigError if the topology has other than the group's number of ranks.
    """

    def __init__(self, topology: ProcessTopology | None = None, process_group: Any = None) -> None:
        self.global_rank = dist.get_rank(group=process_group)
        self.world_size = dist.get_world_size(group=process_group)
        self._topo = topology if topology is not None else _default_topology(self.world_size)
        if self._topo.world_size() != self.world_size:
            raise DeepSpeedConfigError(
                f"the topology has {self._topo.world_size()} ranks, the process group {self.world_size}.\n"
                "  The product of the axes must be the number of ranks."
            )
        topo = self._topo
        self.pipe_parallel_size, self.data_parallel_size, self.model_parallel_size = (
            max(topo.get_dim(axis), 1) for axis in (PIPE, DATA, MODEL)
        )
        self.slice_parallel_size = self.model_parallel_size
        self.stage_id, self.data_parallel_id = self._place(PIPE), self._place(DATA)
        self._by_axis = {axis: self._make(axis) for axis in (PIPE, DATA, MODEL, SEQUENCE)}
        whole_models = [
            topo.filter_match(data=i) if DATA in topo.axes else list(topo.mapping.values())
            for i in range(self.data_parallel_size)
        ]
        whole = GROUPS.share("grid_whole_model", whole_models)
        self.ds_model_proc_group, self.ds_model_world_size = whole.group, len(whole.own)
        self.ds_model_rank = whole.own.index(self.global_rank)
        self.dp_group, self.dp_proc_group = list(self._by_axis[DATA].own), self._by_axis[DATA].group
        self.dp_groups = [list(ranks) for ranks in self._by_axis[DATA].groups]
        self.pp_group, self.pp_proc_group = list(self._by_axis[PIPE].own), self._by_axis[PIPE].group
        self.pipe_groups = [list(ranks) for ranks in self._by_axis[PIPE].groups]
        self.slice_group, self.slice_proc_group = list(self._by_axis[MODEL].own), self._by_axis[MODEL].group
        self.model_groups = [list(ranks) for ranks in self._by_axis[MODEL].groups]
        self.is_first_stage = self.stage_id == 0
        self.is_last_stage = self.stage_id == self.pipe_parallel_size - 1
        self.p2p_groups = self._pairs()

    def _make(self, axis: str) -> Made:
        lists = self._topo.get_axis_comm_lists(axis) or [[rank] for rank in range(self.world_size)]
        return GROUPS.share(f"grid_{axis}", lists)

    def _place(self, axis: str, rank: int | None = None) -> int:
        coord = self._topo.get_coord(self.global_rank if rank is None else rank)
        return int(getattr(coord, axis, 0))

    def _pairs(self) -> list[list[int]]:
        """Each rank with the one at its place in the next stage; the last stage's next is the first."""
        following = {rank: ranks[(i + 1) % len(ranks)] for ranks in self.pipe_groups for i, rank in enumerate(ranks)}
        return [[rank, following[rank]] for rank in range(self.world_size)]

    def stage_to_global(self, stage_id: int, **kwargs: int) -> int:
        """The rank at this rank's place in another stage; `kwargs` change further axes."""
        return self._topo.get_rank(**{**self._topo.get_coord(self.global_rank)._asdict(), PIPE: stage_id, **kwargs})

    def topology(self) -> ProcessTopology:
        """The topology."""
        return self._topo

    def get_global_rank(self) -> int:
        """This rank among all."""
        return self.global_rank

    def get_stage_id(self) -> int:
        """This rank's stage."""
        return self.stage_id

    def get_data_parallel_id(self) -> int:
        """This rank's place in the data axis."""
        return self.data_parallel_id

    def get_pipe_parallel_rank(self) -> int:
        """This rank's stage."""
        return self.stage_id

    def get_pipe_parallel_world_size(self) -> int:
        """Number of stages."""
        return self.pipe_parallel_size

    def get_pipe_parallel_group(self) -> Any:
        """The ranks of one pipeline."""
        return self.pp_proc_group

    get_pipeline_model_parallel_rank = get_pipe_parallel_rank
    get_pipeline_model_parallel_world_size = get_pipe_parallel_world_size
    get_pipeline_model_parallel_group = get_pipe_parallel_group

    def get_data_parallel_rank(self) -> int:
        """This rank's place in the data axis."""
        return self.data_parallel_id

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks that share a batch."""
        return self.data_parallel_size

    def get_data_parallel_group(self) -> Any:
        """Their group."""
        return self.dp_proc_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their ranks."""
        return self.dp_group

    def get_model_parallel_rank(self) -> int:
        """This rank's place among those that hold one whole model (pipe x model)."""
        return self.ds_model_rank

    def get_model_parallel_world_size(self) -> int:
        """How many hold one whole model."""
        return self.ds_model_world_size

    def get_model_parallel_group(self) -> Any:
        """Their group."""
        return self.ds_model_proc_group

    def get_slice_parallel_rank(self) -> int:
        """This rank's place in the model axis."""
        return self._place(MODEL)

    def get_slice_parallel_world_size(self) -> int:
        """Size of the model axis."""
        return self.slice_parallel_size

    def get_slice_parallel_group(self) -> Any:
        """The ranks that hold pieces of the same layers."""
        return self.slice_proc_group

    def get_sequence_parallel_rank(self) -> int:
        """This rank's place in the sequence axis."""
        return self._place(SEQUENCE)

    def get_sequence_parallel_world_size(self) -> int:
        """Size of the sequence axis."""
        return max(self._topo.get_dim(SEQUENCE), 1)

    def get_sequence_parallel_group(self) -> Any:
        """The ranks that have parts of the same sequences."""
        return self._by_axis[SEQUENCE].group

    get_tensor_model_parallel_rank = get_slice_parallel_rank
    get_tensor_model_parallel_world_size = get_slice_parallel_world_size
    get_tensor_model_parallel_group = get_slice_parallel_group


def _default_topology(num_ranks: int) -> ProcessTopology:
    factors = _prime_factors(num_ranks)
    return PipeDataParallelTopology(num_pp=math.prod(factors[0::2]), num_dp=math.prod(factors[1::2]))

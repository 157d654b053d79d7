"""A model as a list of layers, of which a rank builds those of its stages: `PipelineModule`.

Made by users before `deepspeed.initialize`, whose pipeline engine runs it (`engine.pipeline`); stands on the cut (`cut`), the
grid of ranks (`grid`) and the descriptions of layers (`layers`).

    layers       0 1 2 3 4 5 6 7
    2 ranks, a stage each         rank 0: 0 1 2 3            rank 1: 4 5 6 7
    2 ranks, two stages each      rank 0: 0 1, 4 5           rank 1: 2 3, 6 7       placement "loop"
                                  rank 0: 0 1, 6 7           rank 1: 2 3, 4 5       placement "v"

A layer's name is its global number, and that of tied layers `tied_modules.<key>`, so names do not depend on the cut: any
number of stages reads what any other has saved.

Invariant: with `seed_layers` weights and dropout masks do not depend on the cut: a layer is built and run under seeds that
follow from its number, and from how many micro-batches it has seen.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from deepspeed.comm import init_distributed
from deepspeed.parallel.pipeline.actions import looped, v_shaped
from deepspeed.parallel.pipeline.cut import cut, name_of
from deepspeed.parallel.pipeline.files import OwnLayers, load_layers, save_layers
from deepspeed.parallel.pipeline.grid import PipelineParallelGrid
from deepspeed.parallel.pipeline.layers import LayerError, LayerSpec, TiedLayerSpec
from deepspeed.parallel.pipeline.tied import Tie, make_ties, sum_over_owners
from deepspeed.parallel.pipeline.topology import PipeDataParallelTopology, ProcessTopology
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError
from deepspeed.utils.logging import log_dist

_MEGATRON = ("GPTModelPipe", "GPT2ModelPipe")
"""Models of Megatron-DeepSpeed, whose checkpointed layers the contract knows by name."""


class PipelineModule(nn.Module):
    """Layers cut into stages. Collective over the job to make: starts torch.distributed if it is not up.

    layers: LayerSpec, nn.Module or function each, in order; each takes what the one before returns, a tensor or a tuple.
    num_stages, or topology, whose "pipe" axis has that size: the pipeline's ranks.
    loss_fn: `loss_fn(outputs, labels)` on the last stage; without one the last layer returns the loss.
    seed_layers, seed_fn, base_seed: see the module's text.
    partition_method: see `cut`.
    activation_checkpoint_interval: layers per block that backward recomputes; 0 for none.
    num_chunks, placement: stages per rank, and how they lie, for interleaved and V-shaped schedules.
    sample_inputs: a micro-batch's, for `partition_method` "time" and "memory".
    """

    def __init__(
        self,
        layers: Iterable[Any],
        num_stages: int | None = None,
        topology: ProcessTopology | None = None,
        loss_fn: Callable[..., Any] | None = None,
        seed_layers: bool = False,
        seed_fn: Callable[[int], Any] | None = None,
        base_seed: int = 1234,
        partition_method: str = "parameters",
        activation_checkpoint_interval: int = 0,
        activation_checkpoint_func: Callable[..., Any] | None = None,
        checkpointable_layers: Sequence[str] | None = None,
        dynamic_shape: bool = False,
        *,
        num_chunks: int = 1,
        placement: Literal["loop", "v"] = "loop",
        sample_inputs: Any = None,
    ) -> None:
        super().__init__()
        if num_stages is None and topology is None:
            raise LayerError("PipelineModule must be given num_stages or topology.")
        self._layer_specs = list(layers)
        if any(isinstance(layer, PipelineModule) for layer in self._layer_specs):
            raise NotAvailableError("a PipelineModule inside of a PipelineModule.\n  Give its layers in one list.")
        _check_layers(self._layer_specs)
        self.loss_fn, self.seed_layers, self.base_seed = loss_fn, seed_layers, base_seed
        self.loss_is_whole = False
        """Whether, where ranks have parts of sequences, the mean of their losses is the whole sequences' loss."""
        self.seed_fn = seed_fn or set_random_seed
        self.checkpointable_layers = list(checkpointable_layers) if checkpointable_layers is not None else None
        self.activation_checkpoint_func = activation_checkpoint_func or _checkpoint
        self.has_own_checkpoint_func = activation_checkpoint_func is not None
        self.dynamic_shape, self.micro_offset = dynamic_shape, 0
        if not dist.is_initialized():
            init_distributed()
        self._topo = topology or _topology_of(num_stages or 0)
        self.num_stages = self._topo.get_dim("pipe")
        if num_stages not in (None, self.num_stages):
            raise DeepSpeedConfigError(f"num_stages = {num_stages}, but the topology has {self.num_stages} stages.")
        self._grid = PipelineParallelGrid(topology=self._topo)
        self.global_rank = self._grid.global_rank
        self.stage_id = self._grid.get_stage_id()
        self.num_chunks, self.placement = num_chunks, placement
        if placement == "v" and num_chunks != 2:
            raise DeepSpeedConfigError(f'placement = "v" has two stages per rank, not num_chunks = {num_chunks}.')
        self.rank_of = (
            v_shaped(self.num_stages) if placement == "v" else looped(self.num_stages, self.num_stages * num_chunks)
        )
        """By stage; where a rank has several, `num_stages` counts ranks, as the contract has it."""
        self.partition_method = partition_method
        self.parts = cut(self._layer_specs, partition_method, len(self.rank_of), sample_inputs)
        self._build()
        self._mark_empty()
        self.ties: list[Tie] = make_ties(
            self._tie_owners(), dict(self.tied_modules.items()), self.tied_weight_attrs, self._topo, self.global_rank
        )
        self.set_checkpoint_interval(activation_checkpoint_interval)
        self._print_partition()

    # Building. -----------------------------------------------------------------------------------------------------

    @property
    def own_stages(self) -> list[int]:
        """This rank's stages, in the order of the model."""
        return [stage for stage, rank in enumerate(self.rank_of) if rank == self.stage_id]

    def _build(self) -> None:
        self.tied_modules = nn.ModuleDict()
        self.tied_weight_attrs: dict[str, list[str]] = {}
        self.fwd_map: dict[str, int] = {}
        self.forward_funcs: list[Callable[..., Any]] = []
        self._numbers: list[int] = []
        """The global number of each of `forward_funcs`."""
        self._chunk_at: dict[int, tuple[int, int]] = {}
        """By stage, the interval of `forward_funcs` it has."""
        for stage in self.own_stages:
            start = len(self.forward_funcs)
            for number in range(self.parts[stage], self.parts[stage + 1]):
                self._numbers.append(number)
                self.forward_funcs.append(self._build_layer(number, self._layer_specs[number]))
            self._chunk_at[stage] = (start, len(self.forward_funcs))
        first = self.own_stages[0]
        self._local_start, self._local_stop = self.parts[first], self.parts[first + 1]
        for param in self.parameters():
            param.__dict__.setdefault("ds_pipe_replicated", False)
        self._num_forwards = dict.fromkeys(self.own_stages, 0)

    def _build_layer(self, number: int, layer: Any) -> Callable[..., Any]:
        if self.seed_layers and isinstance(layer, LayerSpec):
            self.seed_fn(self.base_seed + number)
        if isinstance(layer, TiedLayerSpec):
            if layer.key not in self.tied_modules:
                self.tied_modules[layer.key] = layer.build()
                self.tied_weight_attrs[layer.key] = layer.tied_weight_attr
            module = self.tied_modules[layer.key]
            return module if layer.forward_fn is None else functools.partial(layer.forward_fn, module)
        if isinstance(layer, LayerSpec):
            layer = layer.build()
        if isinstance(layer, nn.Module):
            self.fwd_map[str(number)] = len(self.forward_funcs)
            self.add_module(str(number), layer)
        function: Callable[..., Any] = layer
        return function

    def _tie_owners(self) -> dict[str, list[int]]:
        owners: dict[str, list[int]] = {}
        for number, layer in enumerate(self._layer_specs):
            if isinstance(layer, TiedLayerSpec):
                owners.setdefault(layer.key, []).append(self.rank_of[self.stage_owner(number)])
        return owners

    def _mark_empty(self) -> None:
        """A rank without parameters gets one without use: optimizers, the user's among them, refuse empty lists."""
        if not any(True for _ in self.parameters()):
            self.register_parameter("no_parameters", nn.Parameter(torch.zeros(1)))

    def _print_partition(self) -> None:
        if self.global_rank != 0:
            return
        lines = [f"{len(self._layer_specs)} layers in {len(self.rank_of)} stages on {self.num_stages} ranks"]
        for stage, rank in enumerate(self.rank_of):
            names = [name_of(layer) for layer in self._layer_specs[self.parts[stage] : self.parts[stage + 1]]]
            lines.append(f"stage {stage} (pipeline rank {rank}): layers {self.parts[stage]} to {self.parts[stage + 1] - 1}: "
                         + " ".join(names))  # fmt: skip
        log_dist("\n  ".join(lines), ranks=[0])

    # Running. ------------------------------------------------------------------------------------------------------

    def forward(self, forward_input: Any, stage: int | None = None) -> Any:
        """One of this rank's stages (default the first) on one micro-batch."""
        stage = self.own_stages[0] if stage is None else stage
        self._num_forwards[stage] += 1
        self.micro_offset = self._num_forwards[stage]
        start, end = self._chunk_at[stage]
        interval = self.activation_checkpoint_interval or max(1, end - start)
        value = forward_input
        for begin in range(start, end, interval):
            block = functools.partial(self._run_layers, begin, min(begin + interval, end), self.micro_offset)
            if self.activation_checkpoint_interval and self._is_checkpointable(begin, min(begin + interval, end)):
                if self._works_in_place(begin, min(begin + interval, end)):
                    block = functools.partial(_on_copies, block)
                value = self.activation_checkpoint_func(block, *(value if isinstance(value, tuple) else (value,)))
            else:
                value = block(*value) if isinstance(value, tuple) else block(value)
        return value

    def _run_layers(self, start: int, end: int, micro_offset: int, *inputs: Any) -> Any:
        value: Any = inputs[0] if len(inputs) == 1 else inputs
        for position in range(start, end):
            if self.seed_layers:
                self.seed_fn(self.base_seed * micro_offset + self._numbers[position])
            value = self.forward_funcs[position](value)
        return value

    def _is_checkpointable(self, start: int, end: int) -> bool:
        functions = self.forward_funcs[start:end]
        if type(self).__name__ in _MEGATRON:
            return all("ParallelTransformerLayerPipe" in type(f).__name__ for f in functions)
        if self.checkpointable_layers is not None:
            return all(type(f).__name__ in self.checkpointable_layers for f in functions)
        return any(next(f.parameters(), None) is not None for f in functions if isinstance(f, nn.Module))

    def _works_in_place(self, start: int, end: int) -> bool:
        """Whether a block may write into its inputs, which a checkpoint keeps."""
        functions = (f for f in self.forward_funcs[start:end] if isinstance(f, nn.Module))
        return any(getattr(inner, "inplace", False) for f in functions for inner in f.modules())

    def set_checkpoint_interval(self, interval: int) -> None:
        """Recompute blocks of so many layers from the next forward on; 0 for none."""
        self.activation_checkpoint_interval = interval
        self.is_checkpointable_results = [
            self._is_checkpointable(begin, min(begin + interval, end))
            for start, end in self._chunk_at.values()
            for begin in (range(start, end, interval) if interval else ())
        ]

    def reset_counts(self) -> None:
        """Count micro-batches anew, for seeds."""
        self._num_forwards = dict.fromkeys(self._num_forwards, 0)

    # The contract's questions. -------------------------------------------------------------------------------------

    def partitions(self) -> list[int]:
        """The bounds of all stages."""
        return self.parts

    def stage_owner(self, layer_idx: int) -> int:
        """The stage that has a layer."""
        if not 0 <= layer_idx < len(self._layer_specs):
            raise LayerError(f"there is no layer {layer_idx}: there are {len(self._layer_specs)}.")
        return next(s for s in range(len(self.rank_of)) if self.parts[s] <= layer_idx < self.parts[s + 1])

    def topology(self) -> ProcessTopology:
        """The ranks' axes."""
        return self._topo

    def mpu(self) -> PipelineParallelGrid:
        """Their groups."""
        return self._grid

    def num_pipeline_stages(self) -> int:
        """Ranks of the pipeline."""
        return self.num_stages

    @property
    def tied_comms(self) -> dict[str, dict[str, Any]]:
        """By key: owners and their group, shared parameters' names, the module."""
        return {tie.key: tie.described() for tie in self.ties}

    def allreduce_tied_weight_gradients(self) -> None:
        """Sum the gradients that tied parameters have as `param.grad` over their owners. The engine does this by itself."""
        for tie in self.ties:
            for param in tie.params:
                if param.grad is not None:
                    sum_over_owners(tie, param.grad)

    def _own_layers(self) -> OwnLayers:
        return OwnLayers(
            self._topo, self.global_rank, list(zip(self._numbers, self.forward_funcs, strict=True)), self.ties
        )

    def save_state_dict(
        self, save_dir: str, checkpoint_engine: Any = None, exclude_frozen_params: bool = False
    ) -> None:
        """Write a file per layer of this rank, by a checkpoint engine's method save or by torch; see `files`."""
        save_layers(self._own_layers(), save_dir, checkpoint_engine, exclude_frozen_params)

    def load_state_dir(self, load_dir: str, checkpoint_engine: Any = None, strict: bool = True) -> None:
        """Read them, whatever the cut was. Collective over the job. Raises LayerError (a RuntimeError) on all ranks."""
        load_layers(self._own_layers(), load_dir, checkpoint_engine, strict)

    def ckpt_layer_path(self, ckpt_dir: str, local_layer_idx: int) -> str:
        """The file of one of this rank's layers."""
        return str(self._own_layers().path(ckpt_dir, self._numbers[local_layer_idx]))

    def get_additional_losses(self) -> dict[str, Tensor] | None:
        """Further losses of the last forward by name, to be averaged and reported; a subclass may have some."""
        return None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every layer of this rank."""
        for layer in self.forward_funcs:
            if isinstance(layer, nn.Module):
                layer.compile(*args, **kwargs)


class DualPipeVModule(PipelineModule):
    """Two stages per rank, rank r having stages r and 2 * ranks - 1 - r; run by DualPipeV."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, num_chunks=2, placement="v")
        self.active_phase = 0

    @property
    def phase_bounds(self) -> list[tuple[int, int]]:
        """The layers of this rank's two stages."""
        return [(self.parts[stage], self.parts[stage + 1]) for stage in self.own_stages]

    def activate_phase(self, phase: int) -> None:
        """Have `forward` without a stage run this one of the two."""
        self.active_phase = phase

    def forward(self, forward_input: Any, stage: int | None = None) -> Any:
        """See PipelineModule."""
        return super().forward(forward_input, self.own_stages[self.active_phase] if stage is None else stage)


def _on_copies(block: Callable[..., Any], *inputs: Any) -> Any:
    return block(*(x.clone() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))


def _check_layers(layers: Sequence[Any]) -> None:
    for number, layer in enumerate(layers):
        if not isinstance(layer, (LayerSpec, nn.Module)) and not callable(layer):
            raise LayerError(f"layer {number} is a {type(layer).__name__}: neither LayerSpec, nn.Module nor function.")


def _topology_of(num_stages: int) -> ProcessTopology:
    world = dist.get_world_size()
    if num_stages < 1 or world % num_stages:
        raise DeepSpeedConfigError(
            f"num_stages = {num_stages} does not divide the {world} ranks of the job.\n  Choose a divisor of {world}."
        )
    return PipeDataParallelTopology(num_pp=num_stages, num_dp=world // num_stages)


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return torch_checkpoint(function, *args, use_reentrant=False)


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)

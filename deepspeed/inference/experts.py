"""Models whose experts are spread over ranks that each answer their own inputs.

Called by the engine; the layers are those of `parallel.expert`. Every rank of the group runs every forward: one whose answer is
finished goes on with padding until all have theirs (`in_step`), because the others' tokens may need its experts.

Invariant: what a rank answers is what it would answer alone with all experts, with the capacities and drops of evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from deepspeed.comm.init import init_distributed
from deepspeed.config.parallelism import ExpertParallelConfig
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.mesh import Mesh, data_parallel_mesh
from deepspeed.mesh.mesh import with_experts, world_size
from deepspeed.parallel.expert import attach, hugging_face, listed
from deepspeed.parallel.expert.layer import MOELayer
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError


@dataclass(frozen=True)
class ExpertRanks:
    """The ranks that share a model's experts."""

    mesh: Mesh

    @property
    def _settings(self) -> ExpertParallelConfig:
        return ExpertParallelConfig(enabled=True, autoep_size=self.mesh.size("experts"))

    def spread(self, module: nn.Module) -> None:
        """Keep this rank's experts of a module. Collective. Raises DeepSpeedConfigError, on all ranks, where it cannot be."""
        size = self.mesh.size("experts")
        error: DeepSpeedError | None = None
        try:
            fused, blocks = hugging_face.find(module, self._settings), listed.find(module, self._settings)
            native = {name: layer for name, layer in attach.expert_layers(module) if layer.ep_size == 1}
            attached = attach.ep_size_of(module)
            _check(module, size, attached, native, bool(fused or blocks))
            hugging_face.check(module, fused, size, "moe.ep_size")
            listed.check(blocks, size)
        except DeepSpeedError as raised:
            error = raised
        told = self.mesh.gather_objects("experts", None if error is None else str(error))
        refusal = next((words for words in told if words is not None), None)
        if refusal is not None:
            raise error or DeepSpeedConfigError(refusal)
        for number, name in enumerate(fused):
            hugging_face.convert(module, name, self.mesh, attach.FIRST_FUSED + number)
        for number, block in enumerate(blocks.values()):
            listed.convert(block, self.mesh, attach.FIRST_LISTED + number)
        for layer in native.values():
            _keep_own(layer, self.mesh)
        attach.attach(module, self.mesh)
        attach.refuse_folders(module, size)

    def agree(self, error: Exception | None) -> None:
        """Raise where any rank has an error: the own one, or a DeepSpeedError with another's words. Collective."""
        told = self.mesh.gather_objects("experts", None if error is None else str(error))
        if error is not None:
            raise error
        rank = next((rank for rank, words in enumerate(told) if words is not None), None)
        if rank is not None:
            raise DeepSpeedError(f"[rank {rank} of {self.mesh.size('experts')}] {told[rank]}")

    def all(self, is_so: bool) -> bool:
        """Whether it is so on every rank. Collective."""
        return all(self.mesh.gather_objects("experts", is_so))

    def in_step(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a generation in which no rank ends before the others."""
        return {"synced_gpus": True, **arguments}

    def release(self) -> None:
        """The engine is done."""
        self.mesh.release()


def ranks_of(modules: list[nn.Module], config: DeepSpeedInferenceConfig) -> ExpertRanks | None:
    """The ranks that the configuration, or the model's own layers, say; None for all experts on every rank. Collective."""
    told = config.moe.ep_size if isinstance(config.moe.ep_size, tuple) else (config.moe.ep_size,)
    sizes = {*(told if config.moe.enabled else ()), *(attach.ep_size_of(module) for module in modules)} - {1}
    if not sizes:
        return None
    if len(sizes) > 1:
        raise DeepSpeedConfigError(
            f"moe.ep_size = {config.moe.ep_size}: experts are spread over {' and over '.join(map(str, sorted(sizes)))} ranks.\n"
            "  Use one size for all layers, or 1."
        )
    size = sizes.pop()
    others = {
        f"tensor_parallel.tp_size = {config.tensor_parallel.tp_size}": config.tensor_parallel.tp_size > 1,
        "checkpoint": config.checkpoint is not None or config.checkpoint_config.checkpoint_dir is not None,
        "save_mp_checkpoint_path": bool(config.save_mp_checkpoint_path),
    }
    other = next((key for key, is_given in others.items() if is_given), None)
    if other is not None:
        raise DeepSpeedConfigError(
            f"moe.ep_size = {size} together with {other}: files and cut layers have all experts.\n"
            "  Load the weights into the model before init_inference, and divide one of the two."
        )
    init_distributed(verbose=False)
    if world_size() % size:
        raise DeepSpeedConfigError(
            f"moe.ep_size = {size}, but the job has {world_size()} ranks.\n"
            f"  Start a multiple of {size} ranks (deepspeed --num_accelerators {size} script.py), or choose a divisor."
        )
    return ExpertRanks(with_experts(data_parallel_mesh(), size))


def _check(module: nn.Module, size: int, attached: int, native: dict[str, MOELayer], has_found: bool) -> None:
    if not (has_found or native or attached > 1):
        raise DeepSpeedConfigError(
            f"moe.ep_size = {size}, but {type(module).__name__} has no layers with experts.\n  Leave moe.ep_size out."
        )
    for name, layer in native.items():
        if layer.place.num_experts % size:
            raise DeepSpeedConfigError(
                f"moe.ep_size = {size} must divide the {layer.place.num_experts} experts of {name}: every rank holds equally many."
            )


def _keep_own(layer: MOELayer, mesh: Mesh) -> None:
    """Of a layer with all experts, those of this rank."""
    size, rank = mesh.size("experts"), mesh.rank("experts")
    here = layer.place.num_experts // size
    experts = layer.experts
    experts.deepspeed_experts = nn.ModuleList(list(experts.deepspeed_experts)[rank * here : (rank + 1) * here])
    experts.num_local_experts = layer.num_local_experts = here
    layer.ep_size, layer.ep_group_name = size, f"ep_size_{size}"

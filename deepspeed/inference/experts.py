"""Models whose experts are spread over ranks that each answer their own inputs.

Called by the engine; the layers are those of `parallel.expert`. Every rank of the group runs every forward: one whose answer is
finished goes on with padding until all have theirs (`in_step`), because the others' tokens may need its experts. Whether all have is asked
over the group of the tokens, which `calls` may replace.

Invariant: what a rank answers is what it would answer alone with all experts, with the capacities and drops of evaluation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.comm.init import init_distributed
from deepspeed.config.parallelism import ExpertParallelConfig
from deepspeed.inference.calls import Calls, calls_of, tell_all
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.mesh import Mesh, data_parallel_mesh
from deepspeed.mesh.mesh import with_experts, world_size
from deepspeed.parallel.expert import attach, hugging_face, listed
from deepspeed.parallel.expert.layer import MOELayer
from deepspeed.parallel.expert.place import PLACE, ExpertPlace
from deepspeed.utils.errors import DeepSpeedConfigError


class Tokens:
    """The ranks between which tokens travel, as every layer with experts knows them: see `calls.Waiting`."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = group, rank, size
        self.wait_for: Callable[[Any], None] | None = None
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def take(self, module: nn.Module) -> None:
        """The layers of a module whose experts were spread."""
        self._layers.update(layer for layer in module.modules() if _place_of(layer) is not None)
        self.tell()

    def tell(self) -> None:
        """Have every layer know the group of now, and how its collectives are waited for."""
        for layer in self._layers:
            if (place := _place_of(layer)) is not None:
                place.group, place.wait_for = self.group, self.wait_for
            if isinstance(layer, MOELayer):
                layer._set_ep_group(self.group)

    def any(self, is_so: bool, device: torch.device) -> bool:
        """Whether it is so on any rank. Collective."""
        flag = torch.tensor(float(is_so), device=device)
        work = dist.all_reduce(flag, group=self.group, async_op=True)
        work.wait() if self.wait_for is None else self.wait_for(work)
        return bool(flag.item())


def _device(group: Any) -> str:
    """Where tensors have to be to be sent."""
    return get_accelerator().current_device_name() if dist.get_backend(group) == "nccl" else "cpu"


def _place_of(layer: nn.Module) -> ExpertPlace | None:
    """Where a layer's experts are, if they are spread."""
    place = layer.place if isinstance(layer, MOELayer) else layer.__dict__.get(PLACE)
    return place if isinstance(place, ExpertPlace) and place.size > 1 else None


@dataclass(frozen=True)
class ExpertRanks:
    """The ranks that share a model's experts."""

    mesh: Mesh
    tokens: Tokens
    calls: Calls | None
    """How one that fails inside of a call tells the others; None where waiting does not stop the host."""

    def call(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward or a generation, on all ranks."""
        return contextlib.nullcontext() if self.calls is None else self.calls

    @property
    def _settings(self) -> ExpertParallelConfig:
        return ExpertParallelConfig(enabled=True, autoep_size=self.mesh.size("experts"))

    def check(self, module: nn.Module) -> None:
        """Raise DeepSpeedConfigError where a module's experts cannot be spread."""
        size = self.mesh.size("experts")
        fused, blocks, native = self._found(module)
        _check(module, size, attach.ep_size_of(module), native, bool(fused or blocks))
        hugging_face.check(module, fused, size, "moe.ep_size")
        listed.check(blocks, size)

    def _found(self, module: nn.Module) -> tuple[Any, Any, dict[str, MOELayer]]:
        """Layers with experts: those that are one in Transformers' models, those in lists, and our own that have all."""
        native = {name: layer for name, layer in attach.expert_layers(module) if layer.ep_size == 1}
        return hugging_face.find(module, self._settings), listed.find(module, self._settings), native

    def spread(self, module: nn.Module) -> None:
        """Keep this rank's experts of a module, which was checked."""
        size = self.mesh.size("experts")
        fused, blocks, native = self._found(module)
        for number, name in enumerate(fused):
            hugging_face.convert(module, name, self.mesh, attach.FIRST_FUSED + number)
        for number, block in enumerate(blocks.values()):
            listed.convert(block, self.mesh, attach.FIRST_LISTED + number)
        for layer in native.values():
            _keep_own(layer, self.mesh)
        attach.attach(module, self.mesh)
        attach.refuse_folders(module, size)
        self.tokens.take(module)

    def gather(self, value: Any) -> list[Any]:
        """See `agreed.Gather`."""
        return tell_all(self.tokens, value, _device(self.tokens.group))

    def in_step(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a generation in which no rank ends before the others."""
        return {"synced_gpus": True, **arguments}

    def release(self) -> None:
        """The engine is done."""
        if self.calls is not None:
            self.calls.leave(self.tokens)
            self.tokens.tell()
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
    mesh = with_experts(data_parallel_mesh(), size)
    tokens = Tokens(mesh.group("experts", "tokens"), mesh.rank("experts"), size)

    def replace(before: Any, after: Any) -> None:
        mesh.replace(before, after)
        tokens.tell()

    return ExpertRanks(mesh, tokens, calls_of(tokens, replace))


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

"""Models with experts: what the engine does about them before anything is built.

Called by `engine.build`. Layers learn their ranks (`parallel.expert`), checkpoints what local experts are called in the
whole model, and what does not go together is refused on all ranks, before memory is touched.
"""

from __future__ import annotations

from torch import nn

from deepspeed.checkpoint.names import name_children
from deepspeed.config import Config
from deepspeed.mesh import Mesh
from deepspeed.parallel.expert import attach
from deepspeed.utils.errors import DeepSpeedConfigError


def ep_size_of(model: nn.Module) -> int:
    """Over how many ranks a model's experts are spread."""
    return attach.ep_size_of(model)


def spread(model: nn.Module, mesh: Mesh, config: Config) -> None:
    """Give layers with experts their ranks, and names to what they hold. Collective where experts are spread."""
    if mesh.size("experts") > 1:
        _refuse(mesh, config)
    for module, names in attach.attach(model, mesh):
        name_children(module, names)


def _refuse(mesh: Mesh, config: Config) -> None:
    ep = mesh.size("experts")
    if mesh.size("replicate") > 1:
        raise DeepSpeedConfigError(
            f"zero_optimization.mics_shard_size = {config.zero_optimization.mics_shard_size} with experts on {ep} ranks: an "
            "expert's copies are sharded over all ranks that hold it, not in groups.\n  Remove mics_shard_size."
        )
    if mesh.size("near") > 1:
        raise DeepSpeedConfigError(
            f"zero_optimization.zero_hpz_partition_size = {config.zero_optimization.zero_hpz_partition_size} with experts on "
            f"{ep} ranks: an expert's second copy has no group of its own.\n  Remove zero_hpz_partition_size."
        )

"""Models with experts: what the engine does about them before anything is built.

Called by `engine.build`. Layers learn their ranks (`parallel.expert`), checkpoints what local experts are called in the
whole model, and what does not go together is refused on all ranks, before memory is touched.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from torch import nn

from deepspeed.checkpoint.names import name_children
from deepspeed.config import Config
from deepspeed.config.parallelism import ExpertParallelConfig
from deepspeed.engine.expert_load import warn_of_unused_coefficient
from deepspeed.kernels.grouped import Ways
from deepspeed.mesh import Mesh
from deepspeed.mesh.mesh import told_by_all
from deepspeed.parallel.expert import attach, hugging_face, listed, presets
from deepspeed.parallel.expert.groups import configure_moe_param_groups
from deepspeed.utils.errors import DeepSpeedConfigError, DeepSpeedError, RankMismatchError
from deepspeed.utils.logging import log_dist


class _Told(NamedTuple):
    """What a rank tells the others about its experts, before there is a mesh that follows from it."""

    size: int
    layers: dict[str, str]
    """Size and dtype of the experts of each layer."""
    refusal: str = ""


def agreed_ep_size(model: nn.Module, config: Config) -> int:
    """Over how many ranks a model's experts are spread. Collective over the job.

    Raises on every rank: DeepSpeedConfigError where one of them finds that contradictory, RankMismatchError where they differ.
    """
    try:
        told = _Told(_ep_size_of(model, config), _kinds_of_layers(model, config))
    except DeepSpeedError as error:
        told = _Told(1, {}, str(error))
    everyone = told_by_all(told)
    for rank, theirs in enumerate(everyone):
        if theirs.refusal:
            is_own = theirs.refusal == told.refusal
            raise DeepSpeedConfigError(theirs.refusal if is_own else f"rank {rank}: {theirs.refusal}")
    return _agreed(everyone)


def _agreed(everyone: list[_Told]) -> int:
    """The size of all ranks that spread experts; stages of a pipeline have different layers, or none."""
    found: dict[str, dict[str, int]] = {}
    for rank, told in enumerate(everyone):
        for layer, kind in told.layers.items():
            found.setdefault(layer, {}).setdefault(kind, rank)
    sizes = {told.size: rank for rank, told in enumerate(everyone) if told.size > 1}
    differing = next((layer for layer, kinds in found.items() if len(kinds) > 1), None)
    if differing is not None or len(sizes) > 1:
        kinds = found[differing] if differing is not None else {f"ep_size = {n}": rank for n, rank in sizes.items()}
        raise RankMismatchError(
            f"ranks have different experts{'' if differing is None else f' in {differing}'}: "
            + ", ".join(f"rank {rank} has {kind}" for kind, rank in kinds.items())
            + ".\n  Build the same layers, in one dtype, on every rank."
        )
    return next(iter(sizes), 1)


def _kinds_of_layers(model: nn.Module, config: Config) -> dict[str, str]:
    modules: dict[str, tuple[nn.Module, int]] = {}
    modules |= {name: (layer.experts, layer.ep_size) for name, layer in attach.expert_layers(model)}
    settings = config.expert_parallel
    if settings.enabled:
        found: dict[str, nn.Module] = hugging_face.find(model, settings)
        found |= {name: block.experts for name, block in listed.find(model, settings).items()}
        modules |= {name: (module, settings.autoep_size) for name, module in found.items()}
    return {
        name: f"ep_size = {size}, {' and '.join(sorted({str(p.dtype).removeprefix('torch.') for p in module.parameters()}))}"
        for name, (module, size) in modules.items()
    }


def _ep_size_of(model: nn.Module, config: Config) -> int:
    native = attach.ep_size_of(model)
    if not config.expert_parallel.enabled:
        return native
    settings = config.expert_parallel
    found, blocks = hugging_face.find(model, settings), listed.find(model, settings)
    presets.check_model(model, found, {name: block.recipe for name, block in blocks.items()}, settings)
    size = settings.autoep_size
    hugging_face.check(model, found, size)
    listed.check(blocks, size)
    if native not in (1, size):
        raise DeepSpeedConfigError(
            f"expert_parallel.autoep_size = {size}, but the model has MoE layers of ep_size = {native}.\n  Use one size for both."
        )
    return size


Gone = frozenset[nn.Parameter]
"""Parameters that left the model, because other ranks hold them."""


def spread(model: nn.Module, mesh: Mesh, config: Config) -> Gone:
    """Give layers with experts their ranks, and names to what they hold. Collective where experts are spread."""
    if mesh.size("experts") > 1:
        _refuse(mesh, config)
        mesh.group("experts", "tokens")  # by all ranks: a pipeline's stage without such layers makes the groups too
    for _, layer in attach.expert_layers(model):
        layer.wall_clock_breakdown = layer.gate.wall_clock_breakdown = config.wall_clock_breakdown
    for module, names in attach.attach(model, mesh):
        name_children(module, names)
    gone = _spread_found(model, mesh, config.expert_parallel) if config.expert_parallel.enabled else Gone()
    attach.refuse_folders(model, mesh.size("experts"))
    return gone


def _spread_found(model: nn.Module, mesh: Mesh, settings: ExpertParallelConfig) -> Gone:
    """What `expert_parallel` finds."""
    found, blocks = hugging_face.find(model, settings), listed.find(model, settings)
    already = {name for name, _ in hugging_face.converted(model)}
    gone: set[nn.Parameter] = set()
    ways = Ways(settings.use_grouped_mm, settings.use_grouped_mm and not settings.disable_triton_grouped_mm)
    for number, (name, module) in enumerate(found.items()):
        if name not in already:
            _refuse_sharded(name, module, mesh)
            hugging_face.convert(model, name, mesh, attach.FIRST_FUSED + number, ways=ways)
    for number, (name, block) in enumerate(blocks.items()):
        if name not in already:
            names, left = listed.convert(block, mesh, attach.FIRST_LISTED + number)
            gone.update(left)
            if mesh.size("experts") > 1:
                name_children(block.module._modules[block.child], names)  # type: ignore[arg-type]
    warn_of_unused_coefficient(getattr(model, "config", None))
    alone = hugging_face.left_alone(model, {*found, *blocks})
    log_dist(
        f"expert_parallel: the experts of {len(found) + len(blocks)} layers are spread over {mesh.size('experts')} ranks"
        + (f"; left as they are, on every rank: {', '.join(alone)}" if alone else "")
        + ".",
        [0],
        logging.WARNING if alone else logging.INFO,
    )
    return Gone(gone)


def parameter_groups(model_parameters: Any) -> Any:
    """What the user gave as `model_parameters`, with experts of native layers in groups of their own."""
    return configure_moe_param_groups(model_parameters)


def without(gone: Gone, groups: list[dict[str, Any]]) -> None:
    """Take parameters that left the model out of an optimizer's groups, in place."""
    for group in groups if gone else []:
        group["params"] = [param for param in group["params"] if param not in gone]


def _refuse_sharded(name: str, module: nn.Module, mesh: Mesh) -> None:
    if mesh.size("experts") > 1 and any(hasattr(param, "ds_id") for param in module.parameters()):
        raise DeepSpeedConfigError(
            f"the experts of {name} were sharded by zero.Init (or an earlier engine) before expert_parallel could spread them.\n"
            "  Build the model without zero.Init; with expert_parallel a rank then keeps its own experts only."
        )


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

"""A model's layers with experts as one of the ranks has them that share the experts: without ranks, by shapes alone.

Called by the estimator before it traces. The first rank is played. Its tokens are routed evenly (`parallel.expert.even`), so it gets as many
from the others as it sends them; a run whose router prefers some experts needs more where these are.

Blocks with a list of experts are found by trying them on values (`learned`), so in a model that has some; a meta model's stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from deepspeed.config import Config
from deepspeed.mesh import marks
from deepspeed.mesh.marks import Expert
from deepspeed.parallel.expert import attach, hugging_face, listed
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.errors import DeepSpeedConfigError


def expert_ranks(model: nn.Module, config: Config) -> int:
    """Over how many ranks the experts of a model are spread."""
    settings = config.expert_parallel
    return max(attach.ep_size_of(model), settings.autoep_size if settings.enabled else 1)


def check_ranks(size: int, world_size: int) -> None:
    """Refuse what the engine refuses. Raises DeepSpeedConfigError."""
    if world_size % size:
        raise DeepSpeedConfigError(
            f"experts on {size} ranks: {size} does not divide world_size = {world_size}, among which data is divided."
        )


def learned(model: nn.Module, config: Config) -> Mapping[str, listed.Block]:
    """A user's blocks with a list of experts whose computation is known, by name."""
    return listed.find(model, config.expert_parallel) if config.expert_parallel.enabled else {}


def spread_experts(model: nn.Module, config: Config, blocks: Mapping[str, listed.Block]) -> None:
    """Have `model`, which has shapes only, be the first rank's. `blocks`: those `learned` of the user's."""
    size = expert_ranks(model, config)
    for number, (_, layer) in enumerate(attach.expert_layers(model)):
        if layer.ep_size == 1:
            continue
        layer.place.size, layer.place.number = size, number
        for i, expert in enumerate(layer.experts.deepspeed_experts):
            made = Expert(i, layer.place.num_experts, layer.ep_group_name)
            for param in expert.parameters():
                marks.mark_expert(param, made)
    if config.expert_parallel.enabled:
        found = hugging_face.find(model, config.expert_parallel)
        hugging_face.check(model, found, size)
        for number, (name, module) in enumerate(found.items()):
            num_experts = module.get_parameter(hugging_face.DOWN).shape[0]
            hugging_face.convert_at(model, name, ExpertPlace(num_experts, size, number=attach.FIRST_FUSED + number))
        spread_lists(model, blocks, size)


def spread_lists(model: nn.Module, blocks: Mapping[str, listed.Block], size: int) -> None:
    """The same for blocks with a list of experts."""
    listed.check(dict(blocks), size)
    for number, (name, known) in enumerate(blocks.items()):
        module = model.get_submodule(name)
        experts = module.get_submodule(known.child)
        assert isinstance(experts, nn.ModuleList), "the user's is one, and this is its copy"
        place = ExpertPlace(len(experts), size, number=attach.FIRST_LISTED + number)
        listed.convert_at(listed.Block(module, experts, known.child, known.recipe), place)

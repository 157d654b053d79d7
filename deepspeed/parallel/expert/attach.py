"""The layers with experts of a model learn their ranks, and their parameters are marked.

Called by the engine, first to know how many ranks share experts (`ep_size_of`, before there is a mesh), then with the
mesh. What a layer's experts are called in the whole model is handed back, for checkpoints.

Invariant: what is an expert follows from types of modules, never from names. At ep_size 1 experts are parameters like
all others, and nothing is marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from deepspeed.mesh import Mesh, marks
from deepspeed.mesh.marks import Expert
from deepspeed.parallel.expert.experts import check_alike
from deepspeed.parallel.expert.gate import Noise
from deepspeed.parallel.expert.layer import MOELayer
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.save_pretrained import refuse_save_pretrained

FIRST_FUSED = 1 << 20
"""Numbers of layers whose experts are matrices begin here ..."""
FIRST_LISTED = 1 << 21
"""... and of blocks with a list of experts here."""


class Named(NamedTuple):
    """A module whose children have other names in the whole model."""

    module: nn.Module
    names: dict[str, str]


def expert_layers(model: nn.Module) -> Iterator[tuple[str, MOELayer]]:
    """The native layers of a model, by name."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, MOELayer))


def ep_size_of(model: nn.Module) -> int:
    """Over how many ranks the layers of a model spread their experts; 1 without any.

    Raises DeepSpeedConfigError where layers name different sizes above 1, or a layer's experts differ.
    """
    for name, layer in expert_layers(model):
        check_alike(name.removesuffix(".deepspeed_moe"), layer.experts.deepspeed_experts)
    sizes = {layer.ep_size: name for name, layer in expert_layers(model) if layer.ep_size > 1}
    if len(sizes) > 1:
        told = ", ".join(f"{size} ({name})" for size, name in sizes.items())
        raise DeepSpeedConfigError(
            f"layers with experts have different ep_size: {told}.\n"
            "  Give all layers one ep_size, or 1 (every rank has all experts); their num_experts may differ."
        )
    return next(iter(sizes), 1)


def attach(model: nn.Module, mesh: Mesh) -> list[Named]:
    """Give every layer its ranks and mark its parameters; the names of local experts. Collective if experts are spread."""
    named = []
    noise = Noise(mesh.group("tensor", "tokens")) if mesh.size("tensor") > 1 else None
    for number, (_, layer) in enumerate(expert_layers(model)):
        if noise is not None:
            layer.gate.noise = noise
        if layer.ep_size == 1:
            continue
        connect(layer.place, mesh, number)
        layer._set_ep_group(layer.place.group)
        named.append(Named(layer.experts.deepspeed_experts, layer.experts.names(layer.place)))
        marks.load_own_experts(layer.experts.deepspeed_experts, layer.place.first, layer.place.num_experts)
        for i, expert in enumerate(layer.experts.deepspeed_experts):
            made = Expert(layer.place.first + i, layer.place.num_experts, layer.ep_group_name)
            for param in expert.parameters():
                marks.mark_expert(param, made)
                param.allreduce, param.group_name = False, layer.ep_group_name  # type: ignore[attr-defined]
    return named


def refuse_folders(model: nn.Module, size: int) -> None:
    """Let no rank write its own experts as if they were all."""
    refuse_save_pretrained(
        model,
        lambda layer: any(marks.of(param).is_expert for param in layer.parameters(recurse=False)),
        f"whose experts are spread over {size} ranks would write those of this rank",
        "Write the whole model: engine.save_16bit_model(folder), or engine.save_checkpoint and zero_to_fp32; "
        "in inference, before init_inference.",
    )


def connect(place: ExpertPlace, mesh: Mesh, number: int) -> None:
    """Tell a place its ranks."""
    place.size, place.rank = mesh.size("experts"), mesh.rank("experts")
    place.group, place.number = mesh.group("experts", "tokens"), number

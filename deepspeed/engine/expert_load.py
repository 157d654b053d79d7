"""How evenly a model's experts are used, for the step report; and a warning where nothing makes them so.

`ExpertLoads` is asked by the step report (`engine.step_report`), `AuxiliaryLossWatch` is an observer of its own; both read
what the layers' `Load`s counted (`parallel.expert.load`).

    max_over_mean    tokens of a layer's busiest expert over the mean of its experts: of the worst layer, and over all layers
    dropped          share of choices that no expert took, because they were full
    auxiliary        mean of the layers' auxiliary losses, without anybody's coefficient

Invariant: numbers are of the tokens of all ranks. To read them is collective, at steps that follow from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed.checkpoint.names import GlobalNames
from deepspeed.engine.facts import StepFacts
from deepspeed.engine.observer import Observer
from deepspeed.mesh import Mesh
from deepspeed.mesh.shape import Role
from deepspeed.parallel.expert import adapters, attach, hugging_face
from deepspeed.parallel.expert.layer import MOELayer
from deepspeed.parallel.expert.place import ExpertPlace
from deepspeed.utils.logging import warn_once
from deepspeed.utils.waits import COMMUNICATION


def places(model: nn.Module) -> Iterator[tuple[str, ExpertPlace]]:
    """Where the experts of each layer are, by the layer's name in the whole model."""
    whole = GlobalNames(model)
    for name, layer in attach.expert_layers(model):
        yield whole(name.removesuffix(".deepspeed_moe")), layer.place
    for name, place in hugging_face.converted(model):
        yield whole(adapters.without_wrappers(name).removesuffix(".experts")), place


class LayerLoad(NamedTuple):
    """One layer's step, over all ranks."""

    counts: list[int]
    """Tokens of each expert."""
    chosen: int
    auxiliary: float | None

    @property
    def max_over_mean(self) -> float | None:
        """1 for experts that are used evenly; None where no token came."""
        total = sum(self.counts)
        return max(self.counts) * len(self.counts) / total if total else None


Loads = dict[str, LayerLoad]
"""By layer."""


def in_numbers(loads: Loads) -> dict[str, float]:
    """What the module's text lists; without what is not known."""
    uneven = [value for load in loads.values() if (value := load.max_over_mean) is not None]
    found: dict[str, float] = {}
    if uneven:
        found["max_over_mean"], found["mean_max_over_mean"] = max(uneven), sum(uneven) / len(uneven)
    chosen = sum(load.chosen for load in loads.values())
    if chosen:
        found["dropped"] = 1 - sum(sum(load.counts) for load in loads.values()) / chosen
    losses = [load.auxiliary for load in loads.values() if load.auxiliary is not None]
    if losses:
        found["auxiliary"] = sum(losses) / len(losses)
    return found


@final
class ExpertLoads:
    """The loads of a model's layers, from when this is made."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self._mesh = mesh
        self._places = dict(places(model))
        self.exist = any(mesh.gather_objects("pipeline", bool(self._places)))
        self.resume()

    def pause(self) -> None:
        """Do not count: an evaluation."""
        for place in self._places.values():
            place.load.is_watched = False

    def resume(self) -> None:
        """Count again."""
        for place in self._places.values():
            place.load.is_watched = True

    @torch.no_grad()
    def take(self) -> Loads:
        """What was counted since the last call. Collective over all ranks that train one model."""
        values = [self._of(place) for place in self._places.values()]
        found: Loads = {}
        if values:
            summed = self._sum(torch.cat(values).cpu())
            sizes = [value.numel() for value in values]
            for name, part in zip(self._places, summed.split(sizes), strict=True):
                chosen, auxiliary, num_known, *counts = part.tolist()
                known = auxiliary / num_known if num_known else None
                found[name] = LayerLoad([int(count) for count in counts], int(chosen), known)
        for others in self._mesh.gather_objects("pipeline", found):
            found |= others
        return found

    def _of(self, place: ExpertPlace) -> Tensor:
        """[choices, auxiliary loss, whether it is known, tokens per expert...] of this rank."""
        taken, auxiliary = place.load.take(), place.load.auxiliary
        place.load.auxiliary = None
        if taken is None:
            return torch.zeros(3 + place.num_experts, dtype=torch.float64)
        counts, chosen = taken
        known = counts.new_tensor([auxiliary is not None], dtype=torch.float64)
        loss = known.new_zeros(1) if auxiliary is None else auxiliary.reshape(1).double()
        return torch.cat([chosen.reshape(1).double(), loss, known, counts.double()])

    def _sum(self, values: Tensor) -> Tensor:
        """Over the ranks among which tokens are divided: those with other experts, then those with the same ones."""
        roles: tuple[Role, ...] = ("experts", "expert_shard")
        for role in roles:
            group = self._mesh.group(role, "control", "gloo")
            if group is not None:
                with COMMUNICATION.during("moe.load", values.nbytes):
                    dist.all_reduce(values, group=group)
        return values


def trainable_gates(model: nn.Module) -> dict[str, MOELayer]:
    """The layers whose gate learns to choose, by name."""
    return {
        name.removesuffix(".deepspeed_moe"): layer
        for name, layer in attach.expert_layers(model)
        if layer.place.num_experts > 1 and layer.gate.wg.weight.requires_grad
    }


@final
class AuxiliaryLossWatch(Observer):
    """Warns after the first step, once, where the layers' auxiliary losses are no part of the loss."""

    def __init__(self, gates: dict[str, MOELayer]) -> None:
        self._loads = {name: layer.place.load for name, layer in gates.items()}
        for load in self._loads.values():
            load.awaits_use = True

    def step_ended(self, facts: StepFacts) -> None:
        """See Observer."""
        loads, self._loads = self._loads, {}
        forgotten = [name for name, load in loads.items() if load.was_made and not load.was_used]
        for load in loads.values():
            load.awaits_use = False
        if forgotten:
            warn_once(
                f"the auxiliary loss of {', '.join(forgotten[:3])}{' and others' if len(forgotten) > 3 else ''} is no part of "
                "the loss, so nothing keeps tokens from going to a few experts.\n"
                "  Add the second value that MoE returns, times about 0.01, to the loss; or balance the gate in another way."
            )


def warn_of_unused_coefficient(config: Any) -> None:
    """Say that a Hugging Face model computes no auxiliary loss though its configuration weighs one."""
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if coefficient and getattr(config, "output_router_logits", None) is False:
        warn_once(
            f"the model's auxiliary loss (router_aux_loss_coef = {coefficient}) is not computed, because its configuration has "
            "output_router_logits = False, so nothing keeps tokens from going to a few experts.\n"
            "  Set model.config.output_router_logits = True; or router_aux_loss_coef = 0.0, if that is meant."
        )

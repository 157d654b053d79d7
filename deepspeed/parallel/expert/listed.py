"""Blocks that keep their experts as a list of modules, found by structure, spread over ranks.

Called by the engine where the configuration has `expert_parallel`; the elder sibling of `hugging_face`, for models whose
code is not of Transformers 5. A block is a module with a list of alike `experts` and a router, a child with a weight
[experts, width]. Its forward becomes that of its recipe (`recipe`), which was tried against the block's own.

A rank keeps its own experts as the modules that they were; the others leave the model, and the optimizer that was built on
them. In the whole model, and so in checkpoints, experts have the numbers that they had.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspeed.config.parallelism import ExpertParallelConfig
from deepspeed.mesh import Mesh, marks
from deepspeed.mesh.marks import Expert
from deepspeed.parallel.expert.dispatch import apart, run_experts
from deepspeed.parallel.expert.experts import check_alike
from deepspeed.parallel.expert.layer import MOELayer
from deepspeed.parallel.expert.place import PLACE, ExpertPlace
from deepspeed.parallel.expert.recipe import Recipe, find_recipe
from deepspeed.utils.errors import DeepSpeedConfigError

RECIPE = "ds_recipe"
"""Attribute of a block: its `Recipe`, or None where it has none."""


class Block(NamedTuple):
    """A block whose recipe is known."""

    module: nn.Module
    experts: nn.ModuleList
    child: str
    """What it calls its experts."""
    recipe: Recipe


def find(model: nn.Module, config: ExpertParallelConfig) -> dict[str, Block]:
    """The blocks that can be spread, by name; the configuration's patterns narrow them down.

    Raises DeepSpeedConfigError for a block that is not understood and whose experts differ in dtype, device or frozen flags.
    """
    pattern = re.compile(config.moe_layer_pattern) if config.moe_layer_pattern else None
    child = config.expert_pattern or "experts"
    found = {}
    for name, module in model.named_modules():
        experts = module._modules.get(child)
        if not _is_list(experts) or isinstance(module, MOELayer) or (pattern and not pattern.search(name)):
            continue
        assert isinstance(experts, nn.ModuleList), "checked"
        if RECIPE not in module.__dict__:
            module.__dict__[RECIPE] = _learn(model, module, experts, config.router_pattern)
        if module.__dict__[RECIPE] is not None:
            found[name] = Block(module, experts, child, module.__dict__[RECIPE])
        else:
            check_alike(name, experts)  # which may be why
    return found


def _is_list(experts: Any) -> bool:
    """Whether these are two or more modules of one kind, whose weights have the same shapes and are here."""
    if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
        return False
    kinds = {(type(e), tuple((n, tuple(p.shape)) for n, p in e.named_parameters())) for e in experts}
    return len(kinds) == 1 and not any(hasattr(p, "ds_id") or p.is_meta for p in experts.parameters())


def _learn(model: nn.Module, block: nn.Module, experts: nn.ModuleList, router: str | None) -> Recipe | None:
    names = [router] if router else [name for name, child in block.named_children() if _is_router(child, len(experts))]
    if len(names) != 1 or not _is_router(block._modules.get(names[0]), len(experts)):
        return None
    owners = [block, block.get_submodule(names[0]), getattr(block, "config", None), getattr(model, "config", None)]
    return find_recipe(block, experts, names[0], [owner for owner in owners if owner is not None])


def _is_router(module: Any, num_experts: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] == num_experts


def check(found: dict[str, Block], ep: int) -> None:
    """Refuse sizes and experts that do not fit. Raises DeepSpeedConfigError, naming the layer."""
    for name, block in found.items():
        num = len(block.experts)
        if num % ep:
            raise DeepSpeedConfigError(
                f"expert_parallel.autoep_size = {ep} must divide the {num} experts of {name}: every rank holds equally many.\n"
                f"  Choose among {[n for n in range(1, num + 1) if num % n == 0]}."
            )
        check_alike(name, block.experts)


def convert(block: Block, mesh: Mesh, number: int) -> tuple[dict[str, str], list[nn.Parameter]]:
    """Keep this rank's experts and have the block exchange tokens; (names of the local ones, parameters that left)."""
    group = mesh.group("experts", "tokens")
    return convert_at(block, ExpertPlace(len(block.experts), mesh.size("experts"), mesh.rank("experts"), group, number))


def convert_at(block: Block, place: ExpertPlace) -> tuple[dict[str, str], list[nn.Parameter]]:
    """The same for a place that is known."""
    here = range(place.first, place.first + place.num_here)
    module: Any = block.module
    gone = [param for i, expert in enumerate(block.experts) if i not in here for param in expert.parameters()]
    if place.size > 1:
        kept = nn.ModuleList(block.experts[i] for i in here)
        module._modules[block.child] = kept
        marks.load_own_experts(kept, place.first, place.num_experts)
        for i, expert in zip(here, kept, strict=True):
            each: Any
            for each in expert.parameters():
                marks.mark_expert(each, Expert(i, place.num_experts, f"ep_size_{place.size}"))
                each.allreduce, each.group_name = False, f"ep_size_{place.size}"
    module.__dict__[PLACE] = place
    module.ds_experts_child = block.child
    kind: Any = type(module)
    module.__class__ = _spread_class(kind)
    return {str(i): str(number) for i, number in enumerate(here)}, gone


@functools.cache
def _spread_class(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"forward": _forward, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
    """The block's recipe, with experts on several ranks."""
    recipe: Recipe = self.__dict__[RECIPE]
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    chosen, weights, logits = recipe.choose(self, tokens)
    compute = functools.partial(_compute, self._modules[self.ds_experts_child])
    result = run_experts(tokens, chosen, weights, self.__dict__[PLACE], apart(compute))
    beside = recipe.beside(self, tokens)
    result = (result if beside is None else result + beside).view(hidden_states.shape)
    return (result, logits) if recipe.returns_logits else result


def _compute(experts: nn.ModuleList, rows: Tensor, counts: list[int]) -> Tensor:
    return torch.cat([expert(part) for expert, part in zip(experts, rows.split(counts), strict=True)])

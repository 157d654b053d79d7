"""Experts of Hugging Face models: their matrices of all experts, found by structure, spread over ranks.

Called by the engine where the configuration has `expert_parallel`. A model's own block stays as it is: its router, with
whatever scores, corrections, groups and norms it has, its shared experts and their gate. What is replaced is how
the module with the experts' matrices computes, which takes (tokens, chosen experts, weights) in all of them:

    gate_up_proj [experts, 2 * inner, width]   (or up_proj, without a gate; transposed, and with biases, in some)
    down_proj    [experts, width, inner]

So the routing equals the plain model's to the bit, of every family, and parameters keep their names; a rank holds rows
[first, first + here) of each. The module's class becomes a subclass of its own, which isinstance does not notice.

Invariant: parameters stay the objects that they were, so optimizers that were built on them hold the same.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed.config.parallelism import ExpertParallelConfig
from deepspeed.kernels.expert_mlp import Activation, AnyActivation, GatedSilu, expert_mlp, takes
from deepspeed.kernels.grouped import EVERY_WAY, Ways, grouped_product
from deepspeed.mesh import Mesh, marks
from deepspeed.mesh.marks import Cut, Expert, Mark
from deepspeed.parallel.expert import adapters
from deepspeed.parallel.expert.dispatch import apart, run_experts
from deepspeed.parallel.expert.place import PLACE, ExpertPlace
from deepspeed.utils.errors import DeepSpeedConfigError

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
HELD = "ds_held"
"""Name of the module in which a layer holds, by the names of its matrices, a linear layer for each expert in their place."""
DIMS_OF = {
    "gate_up_proj": 3,
    "up_proj": 3,
    "down_proj": 3,
    "gate_up_proj_bias": 2,
    "up_proj_bias": 2,
    "down_proj_bias": 2,
}


def is_fused(module: nn.Module) -> bool:
    """Whether a module has the matrices of all its experts, and computes with them alone."""
    own = dict(module.named_parameters(recurse=False))
    ups = [name for name in UP if name in own]
    if (
        DOWN not in own
        or len(ups) != 1
        or not set(own) <= set(DIMS_OF)
        or getattr(module, "has_post_expert_norm", False)
    ):
        return False
    counts = {value.shape[0] for value in own.values()}
    is_alike = len(counts) == 1 and all(value.dim() == DIMS_OF[name] for name, value in own.items())
    return is_alike and _takes_choices(module)


def _takes_choices(module: nn.Module) -> bool:
    """Whether its forward takes tokens, chosen experts and weights; some take tokens that were sorted before, alone."""
    taken = inspect.signature(type(module).forward).parameters.values()
    return len(taken) >= _NUM_TAKEN or any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in taken)


_NUM_TAKEN = 4
"""With `self`."""


def is_block(module: nn.Module) -> bool:
    """Whether a module looks like a block of experts: a list of alike ones, or matrices of all of them."""
    experts = getattr(module, "experts", None)
    return isinstance(experts, nn.Module) and any(True for _ in experts.parameters())


def find(model: nn.Module, config: ExpertParallelConfig) -> dict[str, nn.Module]:
    """The modules with experts' matrices, by name; the configuration's patterns narrow them down."""
    pattern = re.compile(config.moe_layer_pattern) if config.moe_layer_pattern else None
    found = {}
    for name, module in model.named_modules():
        block, _, child = adapters.without_wrappers(name).rpartition(".")
        if not is_fused(module) or (config.expert_pattern and child != config.expert_pattern):
            continue
        if pattern is None or pattern.search(block) or pattern.search(name):
            found[name] = module
    return found


def left_alone(model: nn.Module, found: Collection[str]) -> list[str]:
    """Blocks with experts that are none of `found`: they stay as they are, on every rank."""
    return [
        name
        for name, module in model.named_modules()
        if is_block(module) and not any(inner == name or inner.startswith(f"{name}.") for inner in found)
    ]


def check(
    model: nn.Module, found: dict[str, nn.Module], ep: int, name_of_size: str = "expert_parallel.autoep_size"
) -> None:
    """Refuse sizes that do not fit the layers. Raises DeepSpeedConfigError, naming the layer."""
    for name, module in found.items():
        num_experts = module.get_parameter(DOWN).shape[0]
        if ep > num_experts:
            raise DeepSpeedConfigError(
                f"{name_of_size} = {ep} exceeds num_experts = {num_experts} of {name}.\n  A rank holds at least one expert."
            )
        if num_experts % ep:
            raise DeepSpeedConfigError(
                f"{name_of_size} = {ep} must divide the {num_experts} experts of {name}: every rank holds equally many.\n"
                f"  Choose among {[n for n in range(1, num_experts + 1) if num_experts % n == 0]}."
            )
        adapters.check(model, name, num_experts // ep)
        flags = {param.requires_grad for param in module.parameters()}
        kinds = {(param.dtype, param.device) for param in module.parameters()}
        if len(flags) > 1 or len(kinds) > 1:
            what = "requires_grad" if len(flags) > 1 else "dtypes or devices"
            raise DeepSpeedConfigError(
                f"the experts' matrices of {name} have different {what}.\n  Freeze all of a layer's experts or none, in one dtype."
            )


def convert(model: nn.Module, name: str, mesh: Mesh, number: int, *, ways: Ways = EVERY_WAY) -> None:
    """Have a module compute with spread experts: keep this rank's, mark them, exchange tokens. Collective at first use."""
    num_experts = model.get_submodule(name).get_parameter(DOWN).shape[0]
    group = mesh.group("experts", "tokens")
    convert_at(
        model, name, ExpertPlace(num_experts, mesh.size("experts"), mesh.rank("experts"), group, number), ways=ways
    )


def convert_at(model: nn.Module, name: str, place: ExpertPlace, *, ways: Ways = EVERY_WAY) -> None:
    """The same for a place that is known."""
    module, num_experts = model.get_submodule(name), place.num_experts
    first, stop = place.first, place.first + place.num_here
    cut = Cut(marks.EXPERT_DIM, 0, ((first, stop),), num_experts)
    mark = Mark(cuts=(cut,), expert=Expert(first, num_experts, f"ep_size_{place.size}"))
    for wrapper in adapters.wrappers(model, name) if place.size > 1 else []:
        adapters.cut(wrapper, place, mark)
    for param in module.parameters():
        if place.size > 1:
            param.data = param.data[first:stop].clone()
            marks.mark(param, mark)
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = f"ep_size_{place.size}"  # type: ignore[attr-defined]
    marks.load_own_parts(module)
    setattr(module, PLACE, place)
    module.ds_ways = ways  # type: ignore[assignment]
    kind: Any = type(module)
    module.__class__ = _spread_class(kind)


def converted(model: nn.Module) -> Iterator[tuple[str, ExpertPlace]]:
    """The places of a model's converted modules, by name."""
    for name, module in model.named_modules():
        if PLACE in module.__dict__:
            yield name, module.__dict__[PLACE]


@functools.cache
def _spread_class(kind: Any) -> Any:
    own: dict[str, Any] = {
        "forward": _forward,
        "__reduce_ex__": _reduce,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (kind,), own)


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickled and copied by the class that it was: its own is found nowhere by name."""
    return _new, (type(module).__bases__[0],), module.__dict__


def _new(kind: Any) -> Any:
    spread: Any = _spread_class(kind)
    return spread.__new__(spread)


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the block asks of its experts: sums of what each token's experts give, weighed."""
    return run_experts(hidden_states, top_k_index, top_k_weights, self.ds_expert_place, functools.partial(_mix, self))


def _mix(module: Any, rows: Tensor, at: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Expert by expert where that is possible, which saves passes over memory; else step by step for all of them."""
    is_apart = torch.is_autocast_enabled(rows.device.type) or HELD in module._modules
    if is_apart or not takes(rows, weights) or not _is_plain(module, rows.dtype):
        return apart(functools.partial(_compute, module))(rows, at, weights, counts)
    up, down = (_matrix(module, name, rows.dtype) for name in (_up_name(module), DOWN))
    return expert_mlp(rows, at, weights, counts, up, down, _activation(module))


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    """Whether nothing but two matrices of that dtype and an activation is at work."""
    has_bias = any(getattr(module, f"{name}_bias", None) is not None for name in (_up_name(module), DOWN))
    activation = getattr(module, "act_fn", None)  # none where a gate of its own says it all
    trains_activation = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    is_same = module.down_proj.dtype == dtype == getattr(module, _up_name(module)).dtype
    return is_same and not (has_bias or trains_activation)


def _activation(module: Any) -> Activation:
    """Between a module's products, by formula where it is the usual one."""
    gate = getattr(type(module), "_apply_gate", None)
    is_usual = gate is None or getattr(gate, "__name__", "") == "_default_apply_gate"  # transformers sets it on classes
    activation = getattr(module, "act_fn", None)
    is_silu = activation is F.silu or type(activation).__name__ in ("SiLU", "SiLUActivation")
    if _up_name(module) == UP[0] and is_usual and is_silu and getattr(module, "is_concatenated", True):
        return GatedSilu()
    return AnyActivation(functools.partial(_activate, module))


def _up_name(module: Any) -> str:
    held = module._modules.get(HELD, ())
    return (
        UP[0] if hasattr(module, UP[0]) or UP[0] in held else UP[1]
    )  # while an adapter is at work, it is no parameter


def _compute(module: Any, rows: Tensor, counts: list[int]) -> Tensor:
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    up = _linear(module, _up_name(module), rows, counts)
    return _linear(module, DOWN, _activate(module, up), counts)


def _activate(module: Any, up: Tensor) -> Tensor:
    """What is between the two products."""
    if _up_name(module) == UP[1]:
        return module.act_fn(up)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(up)
    gate, value = up.chunk(2, dim=-1)
    return module.act_fn(gate) * value


def _matrix(module: Any, name: str, dtype: torch.dtype) -> Tensor:
    weight: Tensor = getattr(module, name).to(dtype)
    return weight if getattr(module, "is_transposed", False) else weight.transpose(1, 2)


def _linear(module: Any, name: str, rows: Tensor, counts: list[int]) -> Tensor:
    if HELD in module._modules:
        layers: list[Any] = list(module.get_submodule(f"{HELD}.{name}").children())
        parts = [layer(part) for layer, part in zip(layers, rows.split(counts), strict=True) if len(part)]
        result = torch.cat(parts) if parts else rows.new_zeros(0, layers[0].out_features)
    else:
        result = grouped_product(rows, _matrix(module, name, rows.dtype), counts, module.ds_ways)
    bias = getattr(module, f"{name}_bias", None)
    if bias is not None:
        result = result + bias.to(rows.dtype).repeat_interleave(torch.tensor(counts, device=rows.device), dim=0)
    return result

"""Experts of Hugging Face's models in 8 or 4 bits: of the matrices of all experts, each expert's becomes a quantized linear layer.

Called by `quantize_layers`, before all other layers are quantized; `save` asks for what is held. The block's router and the way of tokens
to experts are `parallel.expert`'s, whose layers multiply with what is held here (`hugging_face.HELD`), so that a token reads the integers of its own
experts alone. Experts that are spread or cut before are a rank's own.

Invariant: a module answers what it would with the dequantized matrices; `load_state_dict` takes whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.mesh import marks
from deepspeed.parallel.expert.hugging_face import DOWN, HELD, UP, convert_at, is_fused
from deepspeed.parallel.expert.place import PLACE, ExpertPlace
from deepspeed.quant.linear import NotFiniteError, QuantizedLinear, QuantizedWeight
from deepspeed.quant.replace import Around
from deepspeed.quant.spec import Spec, fitting


def quantize_experts(
    model: nn.Module, spec: Spec, groups_per_row: int, keep: Callable[[str], bool], around: Around
) -> None:
    """Quantize the matrices of all experts, layer by layer, where a layer computes as those of Hugging Face do; others stay."""
    for prefix, module in list(model.named_modules()):
        if not is_fused(module) or keep(prefix):
            continue
        names = [name for name in (*UP, DOWN) if name in module._parameters]
        specs = {name: fitting(spec, _width(module, name), groups_per_row) for name in names}
        if None in specs.values():
            continue
        if PLACE not in module.__dict__:
            convert_at(model, prefix, ExpertPlace(module.get_parameter(DOWN).shape[0]))
        made = nn.ModuleDict()
        for name, own in specs.items():
            try:
                made[name] = _quantized(module, name, own, around)  # type: ignore[arg-type]
            except NotFiniteError as error:
                raise NotFiniteError(f"{prefix}.{name}: {error}") from error
        module.add_module(HELD, made)
        module._register_load_state_dict_pre_hook(_take_whole, with_module=True)
        around.fill(module)


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _width(module: nn.Module, name: str) -> int:
    """Inputs of each expert's matrix."""
    return module.get_parameter(name).shape[1 if _is_transposed(module) else 2]


def _quantized(module: nn.Module, name: str, spec: Spec, around: Around) -> nn.ModuleList:
    """A layer for each expert, in the place of one parameter, which is given back."""
    alone = nn.Module()
    alone.register_parameter(name, module.get_parameter(name))
    around.fill(alone)  # this one, and not the others yet
    param = module._parameters.pop(name)
    assert param is not None, "a parameter of this name was found"
    layers = nn.ModuleList()
    marks.carry_over(param, layers)
    for matrix in param.detach():
        weight = QuantizedWeight((matrix.t() if _is_transposed(module) else matrix).contiguous(), spec)
        layers.append(QuantizedLinear(weight, None).train(module.training))
        around.made([layers[-1]], False)
    return layers


def _take_whole(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """In a state dict that is being loaded, each expert's matrix in the place of those of all."""
    for name, layers in module.get_submodule(HELD).named_children():
        given = state.get(prefix + name)
        if isinstance(given, Tensor) and given.dim() == 3:
            del state[prefix + name]
            for index, matrix in enumerate(marks.own_part(given, marks.of(layers).cuts)):
                state[f"{prefix}{HELD}.{name}.{index}.weight"] = matrix.t() if _is_transposed(module) else matrix


def held_experts(model: nn.Module) -> Iterator[tuple[str, list[QuantizedWeight], bool]]:
    """Of each parameter that was quantized: its name, its experts' weights, and whether it has them transposed."""
    for prefix, module in model.named_modules():
        held = module._modules.get(HELD)
        for name, layers in held.named_children() if held is not None else ():
            weights = [layer.quantized for layer in layers.children() if isinstance(layer, QuantizedLinear)]
            yield f"{prefix}.{name}".lstrip("."), weights, _is_transposed(module)


def stacked(weights: list[QuantizedWeight], pair_of: Callable[[QuantizedWeight], list[Tensor]]) -> list[Tensor]:
    """Values [experts, out, in] of some experts, and the scale of each group."""
    pairs = [pair_of(weight) for weight in weights]
    return [torch.stack([values for values, _ in pairs]), torch.cat([scales.reshape(-1) for _, scales in pairs])]

"""A model's layers replaced by quantized ones, in place.

`quantize_model` takes every layer that can be, for `init_inference(dtype=torch.int8)`; `quantize_by_name` those whose names a
`weight_quantization.post_init_quant` section names. A weight is quantized and the old one given back layer by layer, so that
memory never holds the model twice. Tied layers share one quantized weight; a layer tied to one that cannot be stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deepspeed.config import load_config
from deepspeed.config.execution import QuantizationSpecConfig
from deepspeed.quant.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from deepspeed.quant.spec import Spec, fitting_group
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import log_dist

Places = dict[int, list[tuple[nn.Module, str, nn.Module]]]
"""By the identity of a weight: parent, name and layer of each layer that has it."""
Make = Callable[[nn.Module, QuantizedWeight], nn.Module]
"""What takes a layer's place, from the layer and its quantized weight."""
Fill = Callable[[nn.Module], None]


def quantize_model(
    model: nn.Module,
    spec: Spec,
    groups_per_row: int = 1,
    keep: Callable[[str], bool] = lambda name: False,
    more: Mapping[type[nn.Module], Make] | None = None,
    fill: Fill = lambda layer: None,
) -> int:
    """Quantize every layer that can be; returns how many weights. `keep` names layers that stay, `more` has kinds of layers
    beyond Linear, Conv1D and Embedding, `fill` gives a layer its weights just before they are quantized.

    Raises DeepSpeedConfigError where there is none, because what was asked for would not happen.
    """
    left: list[str] = []
    count = 0
    kinds = {**_MAKE, **(more or {})}
    for names, sites in _by_weight(model):
        layers = [layer for _, _, layer in sites]
        weight = _weight_of(layers[0])
        wanted = weight.shape[1] // groups_per_row if groups_per_row > 1 else spec.group_size
        group = fitting_group(weight.shape[1], wanted)
        if all(_is_embedding(layer) for layer in layers):
            continue
        if group is None or not all(_is_taken(layer, kinds) for layer in layers) or any(map(keep, names)):
            left += names
            continue
        _replace(sites, Spec(num_bits=spec.num_bits, group_size=group, symmetric=spec.symmetric), kinds, fill)
        count += 1
    left += [f"{name} {list(param.shape)}" for name, param in model.named_parameters() if param.dim() == 3]
    if not count:
        raise DeepSpeedConfigError(
            f"{type(model).__name__} has no layer whose weights can be quantized.\n"
            "  Layers of the classes Linear and Conv1D can, where their inputs divide into even groups. Run it in fp32 or bf16."
        )
    if left:
        log_dist(f"{len(left)} layers of {type(model).__name__} stay as they are: {', '.join(left[:8])}", ranks=[0])
    return count


def quantize_by_name(
    model: nn.Module, specs: Mapping[str, QuantizationSpecConfig], fill: Fill = lambda layer: None
) -> int:
    """Quantize the layers whose names contain a key of `specs`; returns how many weights.

    Raises DeepSpeedConfigError, before anything is changed, for a layer that two keys match, a key that matches none, and
    widths that do not divide.
    """
    chosen: list[tuple[list[tuple[nn.Module, str, nn.Module]], Spec]] = []
    used: set[str] = set()
    for names, sites in _by_weight(model):
        keys = {key for key in specs for name in names if key in name}
        if len(keys) > 1:
            raise DeepSpeedConfigError(
                f"weight_quantization.post_init_quant: {names[0]} is matched by {' and '.join(sorted(keys))}.\n"
                "  Make the keys such that each layer is matched by one."
            )
        if keys:
            used |= keys
            (key,) = keys
            chosen.append((sites, _checked(names[0], _weight_of(sites[0][2]), specs[key])))
    missing = sorted(set(specs) - used)
    if missing:
        raise DeepSpeedConfigError(
            f"weight_quantization.post_init_quant: {', '.join(missing)} matches no layer of {type(model).__name__}.\n"
            f"  Its layers are named {', '.join(names[0] for names, _ in list(_by_weight(model))[:4])}, ..."
        )
    for sites, spec in chosen:
        _replace(sites, spec, _MAKE, fill)
    return len(chosen)


def init_group_wise_weight_quantization(model: nn.Module, ds_config: Any) -> nn.Module:
    """Quantize a model by the section `weight_quantization.post_init_quant` of a configuration; returns the model.

    Importable as `_init_group_wise_weight_quantization` from deepspeed.inference.quantization.quantization.
    """
    quantize_by_name(model, load_config(ds_config).weight_quantization.post_init_quant)
    return model


def _checked(name: str, weight: Tensor, given: QuantizationSpecConfig) -> Spec:
    if given.group_dim != weight.dim() - 1:
        raise DeepSpeedConfigError(
            f"weight_quantization.post_init_quant: group_dim = {given.group_dim} for {name}: groups lie along the last dim here.\n"
            f"  Set group_dim to {weight.dim() - 1}."
        )
    if weight.shape[-1] % given.group_size:
        raise DeepSpeedConfigError(
            f"weight_quantization.post_init_quant: group_size = {given.group_size} does not divide the {weight.shape[-1]} "
            f"inputs of {name}.\n  Choose a divisor."
        )
    return Spec(num_bits=given.num_bits, group_size=given.group_size, symmetric=given.symmetric)


def _by_weight(model: nn.Module) -> Iterator[tuple[list[str], list[tuple[nn.Module, str, nn.Module]]]]:
    found: Places = {}
    names: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for name, layer in parent.named_children():
            weight = getattr(layer, "weight", None)
            if (_is_taken(layer, _MAKE) or isinstance(layer, (nn.Linear, nn.Embedding))) and isinstance(
                weight, nn.Parameter
            ):
                found.setdefault(id(weight), []).append((parent, name, layer))
                names.setdefault(id(weight), []).append(f"{prefix}.{name}".lstrip("."))
    return iter([(names[key], sites) for key, sites in found.items()])


def _is_conv1d(layer: nn.Module) -> bool:
    """Hugging Face's linear layer with a transposed weight."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _is_taken(layer: nn.Module, kinds: Mapping[type[nn.Module], Make]) -> bool:
    """Exact classes: a subclass computes something more."""
    if type(layer) is nn.Embedding and layer.max_norm is not None:
        return False
    return type(layer) in kinds or _is_conv1d(layer)


def _weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if _is_conv1d(layer) else weight


def _linear(layer: nn.Module, weight: QuantizedWeight) -> nn.Module:
    bias = getattr(layer, "bias", None)
    return QuantizedLinear(weight, bias if isinstance(bias, Tensor) else None)


def _embedding(layer: nn.Module, weight: QuantizedWeight) -> nn.Module:
    padding = getattr(layer, "padding_idx", None)
    return QuantizedEmbedding(weight, padding if isinstance(padding, int) else None)


_MAKE: Mapping[type[nn.Module], Make] = {nn.Linear: _linear, nn.Embedding: _embedding}


def _replace(
    sites: list[tuple[nn.Module, str, nn.Module]], spec: Spec, kinds: Mapping[type[nn.Module], Make], fill: Fill
) -> None:
    for _, _, layer in sites:
        fill(layer)
    weight = QuantizedWeight(_weight_of(sites[0][2]).contiguous(), spec)
    for parent, name, layer in sites:
        new = kinds.get(type(layer), _linear)(layer, weight)
        new.train(layer.training)
        setattr(parent, name, new)
        layer._parameters["weight"] = None  # or lists of layers, this one's too, would keep the whole one

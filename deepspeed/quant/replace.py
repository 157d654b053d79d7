"""A model's layers replaced by quantized ones, in place.

`quantize_model` takes every layer that can be, for `init_inference(dtype=torch.int8)`; `quantize_by_name` those whose names a
`weight_quantization.post_init_quant` section names. A weight is quantized and the old one given back layer by layer, so that
memory never holds the model twice. Tied layers share one quantized weight; a layer tied to one that cannot be stays whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepspeed.config.execution import QuantizationSpecConfig
from deepspeed.mesh import marks
from deepspeed.quant.linear import (
    NotFiniteError,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedScaledEmbedding,
    QuantizedWeight,
)
from deepspeed.quant.spec import Spec, fitting
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once
from deepspeed.utils.save_pretrained import refuse_save_pretrained

Places = dict[int, list[tuple[nn.Module, str, nn.Module]]]
"""By the identity of a weight: parent, name and layer of each layer that has it."""
Make = Callable[[nn.Module, QuantizedWeight], nn.Module]
"""What takes a layer's place, from the layer and its quantized weight."""


@dataclass(frozen=True)
class Around:
    """What is done around each weight: `quantized` may give it as it is to be, from elsewhere; `fill` gives a layer its values, `whole` is
    entered while its parameters are read, `made` is told of the quantized weight and of the layers that it is in now."""

    quantized: Callable[[nn.Module, Spec], QuantizedWeight | None] = lambda layer, spec: None
    fill: Callable[[nn.Module], None] = lambda layer: None
    whole: Callable[[list[nn.Parameter]], contextlib.AbstractContextManager[Any]] = lambda params: (
        contextlib.nullcontext()
    )
    made: Callable[[list[nn.Module], bool], None] = lambda layers, was_sharded: None


def quantize_model(
    model: nn.Module,
    spec: Spec,
    groups_per_row: int = 1,
    keep: Callable[[str], bool] = lambda name: False,
    more: Mapping[type[nn.Module], Make] | None = None,
    around: Around = Around(),
    with_embeddings: bool = False,
) -> int:
    """Quantize every layer that can be; returns how many weights. `keep` names layers that stay, `more` has kinds of layers
    beyond Linear, Conv1D and Embedding. An embedding that no such layer is tied to is quantized `with_embeddings` alone.

    Layers that are quantized already stay. Raises DeepSpeedConfigError where there is none at all, because what was asked for would not
    happen.
    """
    _refuse_others(model, spec)
    left: list[str] = []
    count = 0
    kinds = {**_MAKE, **(more or {})}
    for names, sites in _by_weight(model):
        layers = [layer for _, _, layer in sites]
        own = fitting(spec, _shape_of(layers[0])[1], groups_per_row)
        if not with_embeddings and all(_is_embedding(layer) for layer in layers):
            continue
        if own is None or not all(_is_taken(layer, kinds) for layer in layers) or any(map(keep, names)):
            left += names
            continue
        _replace(names[0], sites, own, kinds, around)
        count += 1
    left += [
        f"{prefix}.{name} {list(param.shape)}"
        for prefix, layer in model.named_modules()
        for name, param in layer.named_parameters(recurse=False)
        if param.dim() == 3 and len(param) > 1 and not hasattr(layer, "kernel_size")
    ]
    if not count and not any(isinstance(layer, (QuantizedLinear, QuantizedEmbedding)) for layer in model.modules()):
        raise DeepSpeedConfigError(
            f"{type(model).__name__} has no layer whose weights can be quantized.\n"
            "  Layers of the classes Linear and Conv1D can, where their inputs divide into even groups. Run it in fp32 or bf16."
        )
    if left:
        warn_once(
            f"{len(left)} layers of {type(model).__name__} stay as they are, not quantized: {', '.join(left[:8])}."
        )
    _refuse_folders(model)
    return count


def quantize_by_name(model: nn.Module, specs: Mapping[str, QuantizationSpecConfig], around: Around = Around()) -> int:
    """Quantize the layers whose names contain a key of `specs`; returns how many weights. Those that are quantized already stay.

    Raises DeepSpeedConfigError, before anything is changed, for a layer that two keys match, a key that matches none, and
    widths that do not divide.
    """
    chosen: list[tuple[str, list[tuple[nn.Module, str, nn.Module]], Spec]] = []
    done = [name for name, layer in model.named_modules() if isinstance(layer, (QuantizedLinear, QuantizedEmbedding))]
    used = {key for key in specs if any(key in name for name in done)}
    for key, given in specs.items():
        _refuse_others(
            model, Spec(num_bits=given.num_bits, group_size=given.group_size, symmetric=given.symmetric), key
        )
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
            chosen.append((names[0], sites, _checked(names[0], _shape_of(sites[0][2]), specs[key])))
    missing = sorted(set(specs) - used)
    if missing:
        raise DeepSpeedConfigError(
            f"weight_quantization.post_init_quant: {', '.join(missing)} matches no layer of {type(model).__name__}.\n"
            f"  Its layers are named {', '.join(names[0] for names, _ in list(_by_weight(model))[:4])}, ..."
        )
    for name, sites, spec in chosen:
        _replace(name, sites, spec, _MAKE, around)
    _refuse_folders(model)
    return len(chosen)


def _refuse_others(model: nn.Module, spec: Spec, key: str = "") -> None:
    """Raise DeepSpeedConfigError where a layer is quantized already, but not as asked for; its groups may be smaller."""
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)) and key in name:
            held = layer.quantized.spec
            if (held.num_bits, held.symmetric) != (spec.num_bits, spec.symmetric):
                raise DeepSpeedConfigError(
                    f"{name} has a weight of {held.num_bits} bits ({_kind(held)}), and {spec.num_bits} bits ({_kind(spec)}) are asked for.\n"
                    "  What it was before is gone: load the model again, or ask for what it has."
                )


def _kind(spec: Spec) -> str:
    return "symmetric" if spec.symmetric else "asymmetric"


def _refuse_folders(model: nn.Module) -> None:
    refuse_save_pretrained(
        model,
        lambda layer: isinstance(layer, QuantizedWeight),
        "with quantized weights would write their integers",
        "Save the model before it is quantized, or give init_inference(save_mp_checkpoint_path=...), whose folder it reads.",
    )


def _checked(name: str, shape: tuple[int, ...], given: QuantizationSpecConfig) -> Spec:
    if given.group_dim != len(shape) - 1:
        raise DeepSpeedConfigError(
            f"weight_quantization.post_init_quant: group_dim = {given.group_dim} for {name}: groups lie along the last dim here.\n"
            f"  Set group_dim to {len(shape) - 1}."
        )
    if shape[-1] % given.group_size:
        raise DeepSpeedConfigError(
            f"weight_quantization.post_init_quant: group_size = {given.group_size} does not divide the {shape[-1]} "
            f"inputs of {name}.\n  Choose a divisor."
        )
    return Spec(num_bits=given.num_bits, group_size=given.group_size, symmetric=given.symmetric)


def _by_weight(model: nn.Module) -> Iterator[tuple[list[str], list[tuple[nn.Module, str, nn.Module]]]]:
    found: Places = {}
    names: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for name, layer in parent.named_children():
            weight = layer._parameters.get("weight")
            if (_is_taken(layer, _MAKE) or isinstance(layer, (nn.Linear, nn.Embedding))) and isinstance(
                weight, nn.Parameter
            ):
                found.setdefault(id(weight), []).append((parent, name, layer))
                names.setdefault(id(weight), []).append(f"{prefix}.{name}".lstrip("."))
    return iter([(names[key], sites) for key, sites in found.items()])


def _is_conv1d(layer: nn.Module) -> bool:
    """Hugging Face's linear layer with a transposed weight, or a rank's part of one."""
    return type(layer).__name__ in ("Conv1D", "ConvColumn", "ConvRow") and hasattr(layer, "nf")


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _is_scaled_embedding(layer: nn.Module) -> bool:
    """Of the many families of Hugging Face's that have it: Gemma, Bart, NLLB and others."""
    kind = type(layer)
    return (
        kind.__name__.endswith("ScaledWordEmbedding")
        and kind.__module__.startswith("transformers.")
        and isinstance(getattr(layer, "embed_scale", None), (Tensor, float, int))
    )


def _is_taken(layer: nn.Module, kinds: Mapping[type[nn.Module], Make]) -> bool:
    """Exact classes: a subclass computes something more, and so does a forward that a script has put in."""
    if getattr(layer, "max_norm", None) is not None or "forward" in layer.__dict__:
        return False
    return type(layer) in kinds or _is_conv1d(layer) or _is_scaled_embedding(layer)


def _weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if _is_conv1d(layer) else weight


def _shape_of(layer: nn.Module) -> tuple[int, ...]:
    """[out, in] of a layer's weight, also where ZeRO has sharded it."""
    weight = layer.weight
    assert isinstance(weight, Tensor), "chosen for its weight"
    shape = tuple(getattr(weight, "ds_shape", weight.shape))
    return shape[::-1] if _is_conv1d(layer) else shape


def _linear(layer: nn.Module, weight: QuantizedWeight) -> nn.Module:
    bias = getattr(layer, "bias", None)
    return QuantizedLinear(weight, bias if isinstance(bias, Tensor) else None)


def _embedding(layer: nn.Module, weight: QuantizedWeight) -> nn.Module:
    padding = getattr(layer, "padding_idx", None)
    padding = padding if isinstance(padding, int) else None
    if not _is_scaled_embedding(layer):
        return QuantizedEmbedding(weight, padding)
    scale = layer.embed_scale
    assert isinstance(scale, (Tensor, float, int)), "what makes it one"
    return QuantizedScaledEmbedding(weight, padding, scale)


_MAKE: Mapping[type[nn.Module], Make] = {nn.Linear: _linear, nn.Embedding: _embedding}


def _keep_hooks(layer: nn.Module, new: nn.Module) -> None:
    """What listens to a layer listens to the one in its place; the same dicts, as handles that remove hooks know them."""
    for name, held in vars(layer).items():
        if name.startswith(_HOOKS):
            new.__dict__[name] = held


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook")
"""How attributes begin that `nn.Module` keeps what listens to a call in."""


def _replace(
    name: str,
    sites: list[tuple[nn.Module, str, nn.Module]],
    spec: Spec,
    kinds: Mapping[type[nn.Module], Make],
    around: Around,
) -> None:
    first = sites[0][2]
    try:
        weight = None if _is_conv1d(first) else around.quantized(first, spec)
        for _, _, layer in sites:
            around.fill(layer)
        params = [param for _, _, layer in sites for param in layer.parameters(recurse=False)]
        was_sharded = any(hasattr(param, "ds_shape") for param in params)
        made: list[nn.Module] = []
        with around.whole(params):
            weight = weight or QuantizedWeight(_weight_of(first).contiguous(), spec)
            weight.is_transposed = _is_conv1d(first)
            marks.carry_over(first.weight, weight)
            for parent, child, layer in sites:
                new = kinds.get(type(layer), _embedding if _is_embedding(layer) else _linear)(layer, weight)
                new.train(layer.training)
                _keep_hooks(layer, new)
                setattr(parent, child, new)
                made.append(new)
    except NotFiniteError as error:
        raise NotFiniteError(f"{name}: {error}") from error
    for _, _, layer in sites:
        layer._parameters["weight"] = None  # or lists of layers, this one's too, would keep the whole one
    around.made(made, was_sharded)

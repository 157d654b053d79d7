"""Quantized weights under ZeRO: the section `weight_quantization`, and integers that are sharded and offloaded as parameters are.

`engine.build` calls `quantize` before it makes an optimizer, and `pack` before buckets are planned; scripts call
`init_group_wise_weight_quantization`. A weight that `zero.Init` has sharded is gathered, quantized and sharded again before the next,
so that memory holds one whole weight at a time. What a bucket moves, stores and gathers are the bytes of the integers and
their scales, as one parameter of the model's dtype: copies keep bits, whatever number they would be.

Invariant: nothing that rounds comes between: an exchange or a rest that does is refused (`check_moves_bits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from deepspeed.config import Config, load_config
from deepspeed.config.execution import QuantizationSpecConfig
from deepspeed.quant.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from deepspeed.quant.replace import Around, quantize_by_name, quantize_model
from deepspeed.quant.spec import Spec
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.zero.access import GatheredParameters, register_external_parameter
from deepspeed.zero.init import Init


def init_group_wise_weight_quantization(model: nn.Module, ds_config: Any) -> nn.Module:
    """Quantize a model by the section `weight_quantization.post_init_quant` of a configuration; returns the model.

    Importable as `_init_group_wise_weight_quantization` from deepspeed.inference.quantization.quantization.
    Collective where `zero.Init` has sharded the model.
    """
    config = load_config(ds_config)
    quantize_by_name(model, config.weight_quantization.post_init_quant, _around(ds_config))
    return model


def quantize(model: nn.Module, config: Config, source: Any, trained: Iterable[torch.Tensor]) -> None:
    """Quantize what the section asks for; what is quantized already stays. `source` is the configuration as the user gave it,
    `trained` what an optimizer holds.

    Collective. Raises DeepSpeedConfigError for a weight that is trained, and for names and sizes that do not go.
    """
    section = config.weight_quantization
    if not section.enabled or (section.quantized_initialization is None and not section.post_init_quant):
        return
    held = {id(param) for param in trained}
    around = _around(source, lambda layer: _refuse_trained(model, layer, held))
    if section.post_init_quant:
        quantize_by_name(model, section.post_init_quant, around)
    spec = section.quantized_initialization
    if spec is not None and _has_whole(model):
        _check_groups(spec)
        wanted = Spec(num_bits=spec.num_bits, group_size=spec.group_size, symmetric=spec.symmetric)
        quantize_model(model, wanted, around=around, with_embeddings=True)


def _has_whole(model: nn.Module) -> bool:
    return any(isinstance(layer, (nn.Linear, nn.Embedding)) for layer in model.modules())


def _check_groups(spec: QuantizationSpecConfig) -> None:
    if spec.group_dim != 1:
        raise DeepSpeedConfigError(
            f"weight_quantization.quantized_initialization.group_dim = {spec.group_dim}: groups lie along the last dim here.\n"
            "  Set group_dim to 1."
        )


def _refuse_trained(model: nn.Module, layer: nn.Module, held: set[int]) -> None:
    if id(getattr(layer, "weight", None)) in held:
        name = next(name for name, module in model.named_modules() if module is layer)
        raise DeepSpeedConfigError(
            f"weight_quantization: {name}.weight is in the optimizer, and integers cannot be trained.\n"
            "  Give model_parameters without it (adapters alone), or leave weight_quantization out."
        )


def _around(source: Any, check: Callable[[nn.Module], None] = lambda layer: None) -> Around:
    """Gather what is sharded, and shard what was made of it."""
    context: list[Init] = []

    def made(layers: list[nn.Module], was_sharded: bool) -> None:
        if not was_sharded:
            return
        if not context:
            context.append(Init(config_dict_or_path=source))
        shard(layers, context[0])

    return Around(fill=check, whole=GatheredParameters, made=made)


def shard(layers: Iterable[nn.Module], context: Init) -> None:
    """Have layers rest, sharded, where a context of `zero.Init` puts them. Collective."""
    for layer in layers:
        for inner in layer.modules():
            if isinstance(inner, QuantizedWeight):
                inner.pack(context.dtype)
            context.shard(inner)


def pack(model: nn.Module, dtype: torch.dtype) -> int:
    """Make parameters of all quantized weights, for a model whose parameters are sharded; how many there are."""
    count = 0
    for layer in model.modules():
        if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
            layer.quantized.pack(dtype)
            assert layer.quantized.packed is not None, "pack makes it"
            register_external_parameter(layer, layer.quantized.packed)
            count += 1
    return count


def check_moves_bits(config: Config) -> None:
    """Raise DeepSpeedConfigError where parameters are rounded on the wire or at rest, which integers do not survive."""
    zero = config.zero_optimization
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if getattr(zero, key):
            raise DeepSpeedConfigError(
                f"zero_optimization.{key} with quantized weights: they would be quantized twice.\n  Leave it out."
            )

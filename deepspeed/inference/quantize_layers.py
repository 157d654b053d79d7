"""What `dtype=torch.int8` and the section `quant` mean for a model: which layers are quantized, and how.

Called by `prepare` after a module is cast and loaded; the layers are `quant`'s. The original refuses int8 on every device.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from deepspeed.config.execution import QuantizationSpecConfig
from deepspeed.config.explain import read_section
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.parts import MAKE
from deepspeed.inference.quantized_experts import quantize_experts
from deepspeed.quant.replace import Around, quantize_by_name, quantize_model
from deepspeed.quant.spec import Spec
from deepspeed.utils.errors import DeepSpeedConfigError
from deepspeed.utils.logging import warn_once

_QKV = re.compile(
    r"(^|\.)(q_proj|k_proj|v_proj|q|k|v|query|key|value|qkv|qkv_proj|c_attn|query_key_value|Wqkv|attn_qkvw)$"
)
"""Last parts of the names of layers that make queries, keys and values."""
_WRITTEN = {"RwkvModel": re.compile(r"(^|\.)(attention\.output|feed_forward\.value)$")}
"""By the class of a model, layers whose weights its own forward divides and multiplies in place."""


def quantize(module: nn.Module, config: DeepSpeedInferenceConfig, around: Around) -> None:
    """Quantize what the configuration asks for, in place; `around` loads a layer just before, and puts it at rest.

    Raises DeepSpeedConfigError where that is nothing.
    """
    weight = config.quant.weight
    if not config.quant.enabled or not weight.enabled:
        if config.dtype is torch.int8:
            warn_once("dtype = int8 has no effect: quant.enabled or quant.weight.enabled is false.")
        return
    if weight.post_init_quant:
        specs = {
            key: read_section(QuantizationSpecConfig, value, f"quant.weight.post_init_quant.{key}")
            for key, value in weight.post_init_quant.items()
        }
        quantize_by_name(module, specs, around)
        return
    if config.dtype is not torch.int8 and not weight.quantized_initialization:
        return
    if "num_bits" in config.quant.activation.model_fields_set:
        warn_once("quant.activation.num_bits has no effect: beside quantized weights activations keep 15 bits.")
    spec = Spec(num_bits=weight.num_bits, group_size=weight.group_size, symmetric=weight.q_type == "symmetric")
    if weight.quantized_initialization:
        given = read_section(
            QuantizationSpecConfig, weight.quantized_initialization, "quant.weight.quantized_initialization"
        )
        if given.group_dim != 1:
            raise DeepSpeedConfigError(
                f"quant.weight.quantized_initialization.group_dim = {given.group_dim}: groups lie along the last dim here.\n"
                "  Set group_dim to 1."
            )
        spec = Spec(num_bits=given.num_bits, group_size=given.group_size, symmetric=given.symmetric)
    keep = _kept(module, config)
    quantize_experts(module, spec, weight.q_groups, keep, around)
    quantize_model(module, spec, weight.q_groups, keep, MAKE, around)


def _kept(module: nn.Module, config: DeepSpeedInferenceConfig) -> Callable[[str], bool]:
    """Names of layers that stay as they are."""
    patterns = [] if config.quant.qkv.enabled else [_QKV]
    patterns += [written for inner in module.modules() if (written := _WRITTEN.get(type(inner).__name__)) is not None]
    return lambda name: any(pattern.search(name) for pattern in patterns)

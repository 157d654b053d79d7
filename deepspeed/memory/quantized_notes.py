"""What `weight_quantization` makes of the weights that it names, in bytes.

Asked by `estimator` for a line beside its prediction, which counts those weights whole, as they are before they are quantized.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from deepspeed.config import Config
from deepspeed.config.execution import QuantizationSpecConfig
from deepspeed.zero.param import full_shape


def quantized_notes(model: nn.Module, config: Config) -> list[str]:
    """One line where the section quantizes weights: how many, their bytes whole in the dtype of the run, and quantized."""
    dtype = config.precision_dtype
    found = {id(param): (param, spec) for param, spec in _chosen(model, config)}
    if not found:
        return []
    whole = sum(full_shape(param).numel() * dtype.itemsize for param, _ in found.values())
    small = sum(_nbytes(full_shape(param).numel(), spec) for param, spec in found.values())
    return [
        f"weight_quantization: {len(found)} weights are predicted whole, {whole / 2**20:,.1f} MiB a copy; "
        f"quantized they take {small / 2**20:,.1f} MiB"
    ]


def _chosen(model: nn.Module, config: Config) -> Iterator[tuple[torch.Tensor, QuantizationSpecConfig]]:
    section = config.weight_quantization
    for name, layer in model.named_modules() if section.enabled else ():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            named = [spec for key, spec in section.post_init_quant.items() if key in name]
            spec = named[0] if named else section.quantized_initialization
            if spec is not None:
                yield layer.weight, spec


def _nbytes(numel: int, spec: QuantizationSpecConfig) -> int:
    """Integers, and a scale in fp32 per group, with a minimum where groups are not symmetric."""
    return numel * spec.num_bits // 8 + numel // spec.group_size * (4 if spec.symmetric else 8)

"""Which layers a stage gets: the names of `partition_method` over the arithmetic of `partition`.

Called by `module.PipelineModule` on every rank, with equal results. What a layer costs is read from its description: counted
parameters come from a copy on the meta device, so that nothing is allocated and no random number drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from deepspeed.parallel.pipeline.layers import LayerError, LayerSpec
from deepspeed.parallel.pipeline.partition import balanced, uniform
from deepspeed.parallel.pipeline.profile import costs_of
from deepspeed.utils.errors import DeepSpeedConfigError, NotAvailableError


def cut(layers: Sequence[Any], method: str, num_stages: int, sample_inputs: Any = None) -> list[int]:
    """The bounds of all stages: stage s has layers [bounds[s], bounds[s + 1]). "time" and "memory" are collective over the job.

    Raises LayerError for fewer layers than stages and for a `type:` that no layer has, NotImplementedError for an unknown
    method. Methods are read in lower case, as class names are.
    """
    if len(layers) < num_stages:
        raise LayerError(
            f"a pipeline of {num_stages} stages needs as many layers, got {len(layers)}.\n"
            "  Use fewer stages, or cut the model into more layers."
        )
    kind, _, pattern = method.partition(":")
    kind = kind.lower()
    if kind == "uniform":
        return uniform(len(layers), num_stages)
    if kind in ("parameters", "best"):
        return balanced([float(num_trained(layer)) for layer in layers], num_stages)
    if kind == "type":
        return balanced(_matches(layers, pattern, method), num_stages)
    if kind in ("time", "memory"):
        if sample_inputs is None:
            raise DeepSpeedConfigError(
                f'partition_method = "{method}" runs the layers once: give PipelineModule sample_inputs, the inputs of a micro-batch.'
            )
        return balanced(costs_of(layers, sample_inputs, kind, num_stages), num_stages)
    if kind == "costs":
        return balanced(_costs(layers, pattern, method), num_stages)
    raise NotAvailableError(
        f'partition_method = "{method}" is not known.\n  Use "uniform", "parameters", "time", "memory", '
        '"type:<regular expression>", or "costs:<a number per layer, separated by commas>".'
    )


def _matches(layers: Sequence[Any], pattern: str, method: str) -> list[float]:
    try:
        wanted = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise DeepSpeedConfigError(f'partition_method = "{method}": {error} in the regular expression.') from None
    found = [1.0 if wanted.search(name_of(layer)) else 0.0 for layer in layers]
    if not any(found):
        names = ", ".join(sorted({name_of(layer) for layer in layers}))
        raise LayerError(f'partition_method = "{method}" found no valid layers: none is called so. There are {names}.')
    return found


def _costs(layers: Sequence[Any], text: str, method: str) -> list[float]:
    try:
        costs = [float(word) for word in text.split(",")]
    except ValueError:
        costs = []
    if len(costs) != len(layers):
        raise DeepSpeedConfigError(
            f'partition_method = "{method}": give one number for each of the {len(layers)} layers.'
        )
    return costs


def name_of(layer: Any) -> str:
    """The class name of a layer, or a function's name."""
    if isinstance(layer, LayerSpec):
        return layer.typename.__name__
    return type(layer).__name__ if isinstance(layer, nn.Module) else getattr(layer, "__name__", type(layer).__name__)


def num_trained(layer: Any) -> int:
    """Elements of a layer's parameters that train; of a description, without building it in memory."""
    if isinstance(layer, LayerSpec):
        layer = layer.outline()
    return sum(_numel(p) for p in layer.parameters() if p.requires_grad) if isinstance(layer, nn.Module) else 0


def _numel(param: Any) -> int:
    return int(getattr(param, "ds_numel", None) or param.numel())

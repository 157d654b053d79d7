"""Where sequence-parallel regions begin and end in a model: lists of blocks, and in them the modules that see whole sequences.

Asked by `apply` where `sequence_parallel_regions` is true, after all else was decided; refuses by name what cannot be in one.

Invariant: what is inside of a module that gathers is cut, so that each rank's gradient of the gathered input is a part of the sum;
what is in a block besides sees the own tokens, and its gradient is summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from deepspeed.parallel.tensor.choose import Decision
from deepspeed.parallel.tensor.collectives import TensorGroup
from deepspeed.parallel.tensor.layers import PART, part_of
from deepspeed.parallel.tensor.regions import Region
from deepspeed.parallel.tensor.rules import Action
from deepspeed.utils.errors import DeepSpeedConfigError

_KEY = "tensor_parallel.sequence_parallel_regions = true"
_LAYERS = (Action.COLUMN, Action.ROW, Action.PACKED_COLUMN, Action.PACKED_ROW)
_INSIDE = (*_LAYERS, Action.SUM_GRADIENT)


def divide_blocks(
    model: nn.Module,
    ranks: TensorGroup,
    decisions: Mapping[str, Decision],
    is_cut: Callable[[nn.Parameter], bool],
    sum_gradient: Callable[[nn.Parameter], None],
) -> Iterator[Callable[[], Any]]:
    """What has to be done to the model's blocks. `is_cut` knows the parameters of which a rank has a part, or whose gradient is
    summed already; `sum_gradient` takes those whose gradient has to be.

    Raises DeepSpeedConfigError for models whose blocks cannot be divided.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise DeepSpeedConfigError(f"{_KEY}: an encoder's output reaches every block of {type(model).__name__}, whole.")
    layers = [name for name, decision in decisions.items() if decision.action in _LAYERS]
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(_of(f"{name}.{i}", layers) for i in range(len(module)))
    ]
    outermost = [(n, m) for n, m in lists if len(m) and not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not outermost:
        raise DeepSpeedConfigError(f"{_KEY}: {type(model).__name__} has no list of blocks that all have layers to cut.")
    for name, blocks in outermost:
        region = Region(ranks, blocks)
        yield partial(blocks[0].register_forward_pre_hook, region.open, with_kwargs=True)
        yield partial(blocks[-1].register_forward_hook, region.close)
        for child, block in blocks.named_children():
            yield from _divide(f"{name}.{child}", block, region, decisions, is_cut, sum_gradient)


def _divide(
    name: str,
    block: nn.Module,
    region: Region,
    decisions: Mapping[str, Decision],
    is_cut: Callable[[nn.Parameter], bool],
    sum_gradient: Callable[[nn.Parameter], None],
) -> Iterator[Callable[[], Any]]:
    for full, decision in _of(name, decisions).items():
        if decision.action not in _INSIDE or full.rpartition(".")[0] == name:
            where = "stands in the block itself" if decision.action in _INSIDE else f"is {decision.action.value}"
            raise DeepSpeedConfigError(f"{_KEY}: {full} {where}, which is not shown to work.\n  Leave the key out.")
    for child, module in block.named_children():
        inside = _of(f"{name}.{child}", decisions)
        if not any(decision.action in _LAYERS for decision in inside.values()):
            for param in module.parameters():
                sum_gradient(param)
            continue
        yield partial(module.register_forward_pre_hook, region.gather, with_kwargs=True)
        rows = {full for full, decision in inside.items() if decision.action in (Action.ROW, Action.PACKED_ROW)}
        for inner, layer in module.named_modules(prefix=f"{name}.{child}"):
            for own, param in layer.named_parameters(recurse=False):
                if own == "bias" and inner in rows:
                    sum_gradient(param)
                elif not is_cut(param):
                    raise DeepSpeedConfigError(
                        f"{_KEY}: {inner}.{own} is whole between layers that are cut, where its gradient would be counted "
                        f"{region.ranks.size} times.\n  Leave the key out."
                    )
            if inner in inside and decisions[inner].action in _LAYERS:
                yield partial(_put, layer, region)


def _put(layer: nn.Module, region: Region) -> None:
    layer.__dict__[PART] = dataclasses.replace(part_of(layer), region=region)


def _of(name: str, found: Any) -> Any:
    """The entries for what is inside of a module."""
    if isinstance(found, Mapping):
        return {full: value for full, value in found.items() if full.startswith(f"{name}.")}
    return [full for full in found if full.startswith(f"{name}.")]
